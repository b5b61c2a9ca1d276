#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 600
# memory: 8G
# Room runs out beneath an image: on a full XFS, for new clusters, for copy-on-write of an overlay
# and beneath a mounted file system; and on a block device, which cannot grow. Writes are told so,
# reads go on and are right, and nothing is latched: with room again writes go on, on the same
# device and on a new one. By hand: PATHS='copy', ALL=1.
source "$(dirname "$0")/lib.sh"

BLOCK=65536
if [[ $VM_KERNEL == new ]]; then
    read -r -a paths <<<"${PATHS:-zero-copy copy}"
else
    read -r -a paths <<<"${PATHS:-user-copy copy}"
fi
mkdir small above
within 60 mkfs.xfs -q -f -d size=320m /dev/ram1
within 30 mount /dev/ram1 small

# room MIB: so much is left on the file system.
room() {
    rm -f small/ballast
    within 30 sync -f small
    within 30 fallocate -l $(($(df -B 1 --output=avail small | tail -n 1) - ($1 << 20))) \
        small/ballast
}

# put BLOCK [COUNT]: random bytes; in the model, too, if they were taken.
put() {
    head -c $((BLOCK * ${2:-1})) /dev/urandom >block
    within 60 dd if=block of="$dev" bs=$BLOCK seek="$1" oflag=direct conv=notrunc,fsync \
        status=none 2>put.err || return 1
    dd if=block of=model bs=$BLOCK seek="$1" conv=notrunc status=none
}
# same COUNT WHAT [FIRST]: so many blocks are as in the model.
same() {
    local first=${3:-0}
    within 60 dd if="$dev" of=got bs=$BLOCK skip="$first" count="$1" iflag=direct status=none ||
        fail "$2: cannot be read"
    cmp -n $((BLOCK * $1)) -i "0:$((BLOCK * first))" got model || fail "$2: not what was written"
}
is_good() { [[ $(health "$id") == good ]] || fail "$1: health is '$(health "$id")'"; }

# until_full FIRST WHAT: writes until one is refused, and leaves the first block that was in full.
until_full() {
    local last=4096
    for ((full = $1; full < last; full += 16)); do
        put "$full" 16 && continue
        # Every number is an error, but only one is this one.
        [[ $(<put.err) == *'No space left'* ]] || fail "$2: $(<put.err)"
        return 0
    done
    fail "$2: $((last * BLOCK)) bytes fit"
}

image_of() {
    rm -f "$1" model
    case $2 in
        new) create "$1" 256M ;;
        overlay)
            [[ -e base.raw ]] || head -c 128M /dev/urandom >base.raw
            create "$1" 256M "backing_file=$PWD/base.raw,backing_fmt=raw"
            cp base.raw model
            ;;
    esac
}

# Raw writes to an image on a full file system.
raw_case() {
    local kind=$1 what="$path, $1" start=$SECONDS full
    room 64
    image_of small/image.qcow2 "$kind"
    add small/image.qcow2 --data-path "$path" --allow-backing "$PWD"
    put 0 16 || fail "$what: $(<put.err)"
    room 8
    until_full 16 "$what"
    same "$full" "$what, full"
    is_good "$what, full"
    # What has its space already can be written. A part of a cluster of an overlay has none yet.
    put 0 16 || fail "$what: an overwrite on a full disk: $(<put.err)"
    if [[ $kind == overlay ]]; then
        head -c 4096 /dev/urandom >block
        ! within 30 dd if=block of="$dev" bs=4096 seek=$((1900 * 16 + 3)) oflag=direct \
            conv=notrunc status=none 2>put.err || fail "$what: a copy-on-write on a full disk"
        [[ $(<put.err) == *'No space left'* ]] || fail "$what: $(<put.err)"
        # Nothing of it came through. (Of the write that found the disk full a part may have.)
        same $((2048 - full - 16)) "$what, full" $((full + 16))
    fi
    is_good "$what, full, again"
    room 24
    put "$full" 16 || fail "$what: with room again: $(<put.err)"
    same $((full + 16)) "$what, with room again"
    is_good "$what, with room again"
    # Full once more, and closed like that.
    until_full $((full + 16)) "$what, once more"
    within 90 ublk-qcow2 del -n "$id" 2>del.err || fail "$what: del: $(<del.err)"
    gone "$id"
    sound small/image.qcow2
    room 24
    add small/image.qcow2 --data-path "$path" --allow-backing "$PWD"
    same "$full" "$what, a new device"
    put "$full" 16 || fail "$what, a new device: $(<put.err)"
    del
    sound small/image.qcow2
    rm small/image.qcow2
    say "$what: full after $full blocks, good, and went on; $leaks leaks; $((SECONDS - start)) s"
}

# A file system above.
mounted_case() {
    local what="$path, mounted" start=$SECONDS
    room 64
    create small/image.qcow2 256M
    add small/image.qcow2 --data-path "$path"
    within 60 mkfs.ext4 -q "$dev"
    within 30 mount "$dev" above
    head -c 4M /dev/urandom >file
    cp file above/
    within 30 sync -f above
    room 8
    ! within 60 dd if=/dev/zero of=above/much bs=1M count=48 conv=fsync status=none 2>put.err ||
        fail "$what: 48 MiB fit in 8"
    grep -qE 'No space left|Input/output error' put.err || fail "$what: $(<put.err)"
    echo 3 >/proc/sys/vm/drop_caches
    within 30 cmp file above/file || fail "$what: what was synced is not there"
    is_good "$what"
    room 96
    if within 30 cp file above/second 2>copy.err && within 30 sync -f above 2>>copy.err; then
        cmp file above/second || fail "$what: with room again"
    else
        # That it saw an error is its own affair, but the device must take writes.
        say "$what: ext4 has stopped: $(<copy.err)"
    fi
    within 60 umount above
    within 60 e2fsck -fy "$dev" >fsck 2>&1 || (($? < 4)) || fail "$what: e2fsck: $(<fsck)"
    within 30 mount "$dev" above
    within 30 cmp file above/file || fail "$what: what was synced is not there after e2fsck"
    cp file above/third
    within 60 umount above
    del
    sound small/image.qcow2
    rm small/image.qcow2
    say "$what: $(<put.err); $leaks leaks; $((SECONDS - start)) s"
}

# An image on a block device: full where that ends, and then what a discard gives back is used.
device_case() {
    local what="$path, block device" start=$SECONDS mib=40 full
    dm create beneath --table "0 $((mib * 2048)) linear /dev/ram2 0"
    beneath=$(dm_path beneath)
    rm -f model
    create "$beneath" 256M
    add "$beneath" --data-path "$path"
    put 0 16 || fail "$what: $(<put.err)"
    until_full 16 "$what"
    # In full but for metadata and what the refused write was about to use.
    ((full >= (mib - 4) * 16)) || fail "$what: full after $full blocks of $((mib * 16))"
    same "$full" "$what, full"
    is_good "$what, full"
    put 0 16 || fail "$what: an overwrite on a full device: $(<put.err)"
    within 30 blkdiscard -o 0 -l $((64 * BLOCK)) "$dev"
    dd if=/dev/zero of=model bs=$BLOCK count=64 conv=notrunc status=none
    sleep 1
    put "$full" 16 || fail "$what: after a discard: $(<put.err)"
    same $((full + 16)) "$what, after a discard"
    is_good "$what, after a discard"
    del
    sound "$beneath"
    add "$beneath" --data-path "$path"
    same $((full + 16)) "$what, a new device"
    del
    sound "$beneath"
    dm remove beneath
    say "$what: full after $full blocks of $((mib * 16)); $leaks leaks; $((SECONDS - start)) s"
}

# Where the room runs out is the engine's affair and how that is told the path's: each case with one
# of them is enough for every day. All of them with ALL=1.
for n in "${!paths[@]}"; do
    path=${paths[n]}
    [[ -z ${ALL:-} ]] && ((n % 2)) || { raw_case new; mounted_case; }
    [[ -z ${ALL:-} ]] && ((n % 2 == 0)) || { raw_case overlay; device_case; }
done
within 60 umount small
no_devices
