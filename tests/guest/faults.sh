#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 600
# memory: 8G
# What lies beneath an image fails: sectors that cannot be read or written, tables that cannot be
# written, an fdatasync that fails, a file system that shuts down or goes read-only, with and
# without a file system above. Errors are told and nothing hangs; after a failure that is final
# reads go on, list says so and del ends with a clear word; when the fault is gone the image is
# served again, with leaks at most and all that was flushed. By hand: PATHS='copy'.
source "$(dirname "$0")/lib.sh"

# A loop device has a volatile cache, without which no flush would go down to what fails it.
MIB=96 BLOCK=65536
sectors=$((MIB * 2048))
if [[ $VM_KERNEL == new ]]; then
    read -r -a paths <<<"${PATHS:-zero-copy copy}"
else
    read -r -a paths <<<"${PATHS:-user-copy copy}"
fi

modprobe loop
truncate -s $((MIB << 20)) disk.img
loop=$(within 20 losetup --show -f disk.img)
dm create beneath --table "0 $sectors linear $loop 0"
beneath=$(dm_path beneath)
mkdir above below

# --- faults ---

healthy() { echo "0 $sectors linear $loop 0" | dm_table beneath; }
# range_fails OFFSET BYTES TARGET…: this range is one of another target.
range_fails() {
    local first=$(($1 / 512)) count=$(($2 / 512)) end
    shift 2
    end=$((first + count))
    {
        ((first == 0)) || echo "0 $first linear $loop 0"
        case $1 in
            error) echo "$first $count error" ;;
            writes) echo "$first $count flakey $loop $first 0 60 1 error_writes" ;;
        esac
        ((end == sectors)) || echo "$end $((sectors - end)) linear $loop $end"
    } | dm_table beneath
}
# A flush goes to every target there is, so a small one at the end, where nothing lies, fails them.
flushes_fail() { range_fails $(((MIB << 20) - BLOCK)) $BLOCK writes; }

# --- what is done to the device ---

# put BLOCK [COUNT]: random bytes, and an fsync; in the model, too, if that succeeds.
put() {
    head -c $((BLOCK * ${2:-1})) /dev/urandom >block
    within 30 dd if=block of="$dev" bs=$BLOCK seek="$1" oflag=direct conv=notrunc,fsync \
        status=none 2>put.err || return 1
    dd if=block of=model bs=$BLOCK seek="$1" conv=notrunc status=none
}
# get BLOCK [COUNT]
get() {
    within 30 dd if="$dev" of=got bs=$BLOCK skip="$1" count="${2:-1}" iflag=direct status=none \
        2>get.err
}
# Says that a put or a get failed as a disk does.
told() { [[ $(<"$1.err") == *'Input/output error'* ]] || fail "$2: not EIO: $(<"$1.err")"; }
# same BLOCK COUNT WHAT: the device has what the model has.
same() {
    get "$1" "$2" || fail "$3: cannot be read: $(<get.err)"
    dd if=model of=want bs=$BLOCK skip="$1" count="$2" status=none
    cmp got want || fail "$3: not what was written"
}
is_good() { [[ $(health "$id") == good ]] || fail "$1: health is '$(health "$id")'"; }
has_failed() {
    local now
    now=$(health "$id")
    [[ $now == "failed: "* && $now == *"$1"* ]] || fail "$2: health is '$now'"
    within 20 ublk-qcow2 list -n "$id" | grep 'health failed: ' >/dev/null ||
        fail "$2: list does not say so"
}
# del_tells WHAT: it ends in its limit, and says that the image was not closed cleanly.
del_tells() {
    local start=$SECONDS
    refused "device $id was removed" 'not closed cleanly' 'qemu-img check' -- \
        ublk-qcow2 del -n "$id"
    gone "$id"
    ((SECONDS - start <= 20)) || fail "$1: del took $((SECONDS - start)) s"
    say "$path, $1: $(<refused.err)"
}
# again IMAGE WHAT: it is served as before, with what was flushed in its first blocks.
again() {
    sound "$1"
    add "$1" --data-path "$path"
    is_good "$2, again"
    same 0 8 "$2, again"
    put 9 || fail "$2, again: $(<put.err)"
    del
    sound "$1"
}
# begin IMAGE: a new one, with eight blocks.
begin() {
    rm -f model
    create "$1" 32M
    add "$1" --data-path "$path"
    put 0 8 || fail "$(<put.err)"
}

# --- the cases ---

data_errors() {
    local at
    begin "$beneath"
    at=$(within 20 qemu-img map -U -f qcow2 --output=json "$beneath" |
        jq "first(.[] | select(.data and .start <= 5 * $BLOCK and .start + .length > 5 * $BLOCK)
            | .offset + 5 * $BLOCK - .start)")
    range_fails "$at" $BLOCK error
    ! get 5 || fail "a bad sector was read"
    told get 'a bad sector'
    ! put 5 || fail "a bad sector was written"
    told put 'a bad sector'
    same 0 5 'beside a bad sector'
    same 6 2 'beside a bad sector'
    put 6 || fail "a write beside a bad sector failed: $(<put.err)"
    is_good 'a bad sector'
    healthy
    same 0 5 'the sector is good again'
    put 5 || fail "the sector is good again: $(<put.err)"
    same 0 8 'the sector is good again'
    del
    clean "$beneath"
    say "$path, bad sectors of data: told, and no more than that"
}

sync_errors() {
    begin "$beneath"
    flushes_fail
    # Acknowledged as a write, and then not as an fsync.
    ! put 8 || fail "an fsync succeeded whose flush failed"
    told put 'a failed flush'
    has_failed fdatasync 'a failed flush'
    cp block last
    get 8 || fail "an acknowledged write cannot be read: $(<get.err)"
    cmp got last || fail "an acknowledged write is not there"
    # That it would succeed now is no reason to believe it.
    healthy
    ! put 7 || fail "a write after a failed fdatasync"
    told put 'after a failed fdatasync'
    same 0 8 'after a failed fdatasync'
    has_failed fdatasync 'when flushes succeed again'
    del_tells 'a failed fdatasync'
    again "$beneath" 'a failed fdatasync'
}

# Byte of the first L2 table.
l2_table() {
    local l1
    l1=$(od -A n -t u8 --endian=big -j 40 -N 8 "$1" | tr -d ' ')
    echo $(($(od -A n -t u8 --endian=big -j "$l1" -N 8 "$1" | tr -d ' ') & 0xfffffffffffe00))
}

metadata_errors() {
    local at
    begin "$beneath"
    at=$(l2_table "$beneath")
    range_fails "$at" $BLOCK writes
    ! put 100 || fail "an fsync succeeded without its table"
    told put 'a table that cannot be written'
    has_failed "a metadata write at byte $at" 'a table that cannot be written'
    ! put 1 || fail "a write after a failed one of metadata"
    # A read that finds its place only in memory.
    cp block last
    same 0 8 'after a failed write of metadata'
    healthy
    del_tells 'a failed write of metadata'
    again "$beneath" 'a failed write of metadata'
}

# Flushes beneath fail, with a file system above.
mounted() {
    create "$beneath" 64M
    add "$beneath" --data-path "$path"
    within 60 mkfs.ext4 -q "$dev"
    within 30 mount -o errors=remount-ro "$dev" above
    head -c 2M /dev/urandom >file
    cp file above/
    within 30 sync -f above
    flushes_fail
    ! within 30 dd if=file of=above/lost conv=fsync status=none 2>put.err ||
        fail "a file was fsynced to a disk whose flushes fail"
    has_failed fdatasync 'a disk whose flushes fail'
    echo 3 >/proc/sys/vm/drop_caches
    # Not through ext4: 6.12 refuses reads, too, once its journal has failed.
    within 30 debugfs -R 'dump /file got' "$dev" >debugfs.out 2>&1
    cmp file got || fail "a file cannot be read after a failure: $(<debugfs.out)"
    refused 'in use' -- ublk-qcow2 del -n "$id"
    within 60 umount above
    del_tells 'a failed fdatasync, mounted'
    healthy
    sound "$beneath"
    add "$beneath" --data-path "$path"
    within 60 e2fsck -fy "$dev" >fsck 2>&1 || (($? < 4)) || fail "e2fsck: $(<fsck)"
    within 30 mount "$dev" above
    within 30 cmp file above/file || fail "a file that was synced is not there"
    within 60 umount above
    del
    sound "$beneath"
}

# The image's file system refuses everything from one moment on.
shut_down() {
    within 60 mkfs.xfs -q -f -d size=320m /dev/ram1
    within 30 mount /dev/ram1 below
    begin below/image.qcow2
    within 30 sync -f below
    within 20 xfs_io -x -c shutdown below
    ! put 8 || fail "a write to a file system that was shut down"
    told put 'a file system that was shut down'
    has_failed '' 'a file system that was shut down'
    # It refuses reads, too, and that is what is told.
    ! get 0 || fail "a read from a file system that was shut down"
    told get 'a file system that was shut down'
    del_tells 'a file system that was shut down'
    within 60 umount below
    within 60 mount /dev/ram1 below
    again below/image.qcow2 'a file system that was shut down'
    within 60 umount below
}

# The image's file system has found an error in itself, and is read-only with a writer in it.
read_only() {
    local name=${beneath#/dev/}
    within 60 mkfs.ext4 -q -F "$beneath"
    within 30 mount -o errors=remount-ro "$beneath" below
    echo witness >below/witness
    begin below/image.qcow2
    within 30 sync -f below
    ! within 20 mount -o remount,ro below 2>remount.err || fail "made read-only under a writer"
    echo 1 >"/sys/fs/ext4/$name/trigger_fs_error"
    ! touch below/new 2>touch.err || fail "the file system is not read-only"
    ! put 8 || fail "a write to a file system that is read-only"
    told put 'a file system that is read-only'
    ! put 1 || fail "a write to a file system that is read-only"
    # Only where it gives out what it has (6.12 does not), so can we.
    echo 3 >/proc/sys/vm/drop_caches
    if cat below/witness >/dev/null 2>&1; then
        same 0 8 'a file system that is read-only'
    else
        say "$path: ext4 of this kernel refuses reads after an error"
        ! get 0 || fail "a read from a file system that refuses reads"
        told get 'a file system that refuses reads'
    fi
    has_failed '' 'a file system that is read-only'
    del_tells 'a file system that is read-only'
    # As it is now the image can be served for reading only.
    refused below/image.qcow2 -- ublk-qcow2 add -f below/image.qcow2
    if cat below/witness >/dev/null 2>&1; then
        add below/image.qcow2 --read-only
        same 0 8 'read-only, again'
        del
    fi
    within 60 umount below
    within 60 e2fsck -fy "$beneath" >fsck 2>&1 || (($? < 4)) || fail "e2fsck: $(<fsck)"
    within 30 mount "$beneath" below
    again below/image.qcow2 'a file system that was read-only'
    within 60 umount below
}

for path in "${paths[@]}"; do
    for step in data_errors sync_errors metadata_errors mounted shut_down read_only; do
        say "$path: $step"
        $step
    done
done
no_devices
dm remove beneath
losetup -d "$loop"
