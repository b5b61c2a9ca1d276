#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 300
# memory: 8G
# A disk grows while it is written to: no request fails, the file system above grows into it, and
# what was there is there. What cannot grow is refused by name, and is served as before. By hand:
# ADD_OPTIONS='--stress'.
source "$(dirname "$0")/lib.sh"

size_of_device() { echo $(($(<"/sys/block/ublkb$id/size") * 512)); }
grow() { within 100 ublk-qcow2 resize -n "$id" "$1"; }
# refused SIZE WORD: with an error of one line that has the word, and nothing changed.
refused() {
    local before
    before=$(size_of_device)
    ! grow "$1" 2>err || fail "$(basename "$image"): grew to $1"
    grep -q -e "$2" err || fail "$(basename "$image") to $1: $(<err)"
    [[ $(wc -l <err) == 1 ]] || fail "more than a line: $(<err)"
    [[ $(size_of_device) == "$before" ]] || fail "refused, and yet it has $(size_of_device) bytes"
    [[ $(ublk-qcow2 list --json -n "$id" | jq -r '.[0].health') == good ]] ||
        fail "not well after a refusal: $(ublk-qcow2 list -n "$id")"
}

if [[ $VM_KERNEL == old ]]; then
    image=image.qcow2
    create image.qcow2 64M
    add image.qcow2
    refused 128M 'Linux 6.16'
    del
    clean image.qcow2
    no_devices
    exit 0
fi

# --- beneath a file system that is written to ---
image=fs.qcow2
# Small clusters, so that the L1 table has to move: an entry stands for 2 MiB, a cluster of the table
# for 1 GiB.
create fs.qcow2 512M cluster_size=4k
add fs.qcow2 -q 2 --recovery reissue
within 60 mkfs.ext4 -q "$dev"
mkdir mnt
within 30 mount "$dev" mnt
head -c 32M /dev/urandom >mnt/before
sha256sum mnt/before >sums
# It writes until it is told to end, and then verifies; a part of each file anew.
timeout -k 5 200 bash -c 'for ((n = 0; ; n++)); do
    [[ ! -e enough ]] || exit 0
    fio --name=v --filename=mnt/fio.$((n % 3)) --rw=randwrite --bsrange=4k-64k --size=6M \
        --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --fsync=64 \
        --randseed=$n --output=fio.out || exit 1
done' >fio.err 2>&1 &
fio=$!
for size in 600M 900M 2G 6G; do
    sleep 1
    kill -0 $fio || fail "nobody writes: $(<fio.err) $(<fio.out)"
    grow $size || fail "growing to $size"
    bytes=$(numfmt --from=iec $size)
    [[ $(size_of_device) == "$bytes" ]] || fail "the device has $(size_of_device) bytes, not $size"
    [[ $(ublk-qcow2 list --json -n "$id" | jq '.[0].target.virtual_size') == "$bytes" ]] ||
        fail "list tells another size: $(ublk-qcow2 list --json -n "$id")"
done
within 100 resize2fs "$dev" >resize2fs.out 2>&1 || fail "resize2fs: $(<resize2fs.out)"
touch enough
wait $fio || fail "fio: $(head -c 1500 fio.err) $(tail -c 1500 fio.out)"
(($(df -B 1 --output=size mnt | tail -n 1) > 5 << 30)) || fail "the file system has not grown"
head -c 32M /dev/urandom >mnt/after
sha256sum mnt/after >>sums
# Once more without a server for a moment: the next one knows the new size.
sync
kill -KILL "$(daemon_of "$id")"
within 60 ublk-qcow2 recover -n "$id" >/dev/null || fail "recover after growing"
[[ $(size_of_device) == $((6 << 30)) ]] || fail "after recover it has $(size_of_device) bytes"
grow 7G || fail "growing after recover"
echo 3 >/proc/sys/vm/drop_caches
within 60 sha256sum --quiet -c sums || fail "a file differs"
refused 6G 'only made larger'
refused 7340032001 'multiple'
refused 200T 'l1_size'
within 60 umount mnt
within 60 e2fsck -fn "$dev" >fsck 2>&1 || fail "e2fsck: $(<fsck)"
del
sound fs.qcow2
[[ $(qemu-img info --output=json fs.qcow2 | jq '."virtual-size"') == $((7 << 30)) ]] ||
    fail "qemu-img: $(qemu-img info fs.qcow2)"

# --- ended while it grows ---
# A kill: the next server knows the old size or the new one, and what was acknowledged.
image=ended.qcow2
create ended.qcow2 8M cluster_size=512
add ended.qcow2 --recovery reissue
head -c 4M /dev/urandom >data
within 30 dd if=data of="$dev" bs=64k oflag=direct conv=notrunc status=none
for ((size = 12; size < 36; size += 4)); do
    ublk-qcow2 resize -n "$id" ${size}M 2>err &
    resize=$!
    sleep "0.$((RANDOM % 3))$((RANDOM % 10))"
    kill -KILL "$(jq .pid "/run/ublk-qcow2/$id.json")"
    wait $resize || grep -qE 'ended before|does not take orders|QUIESCED' err ||
        fail "resize whose server was killed: $(<err)"
    within 60 ublk-qcow2 recover -n "$id" >/dev/null || fail "recover after a kill at ${size}M"
    within 30 dd if="$dev" of=got bs=64k count=64 iflag=direct status=none
    cmp got data || fail "after a kill at ${size}M, what was acknowledged is not there"
    grow ${size}M || fail "growing once more to ${size}M"
    [[ $(size_of_device) == $((size << 20)) ]] || fail "the device has $(size_of_device) bytes"
done
# A del: one of the two comes first, and both end.
ublk-qcow2 resize -n "$id" 64M 2>err &
resize=$!
sleep "0.0$((RANDOM % 10))"
del
wait $resize || say "beside del: $(<err)"
sound ended.qcow2
within 30 qemu-io -r -f qcow2 -c 'read -q 0 4M' ended.qcow2

# --- a raw disk: zeros where nothing was, and the bytes behind an end within a cluster ---
image=tail.qcow2
create tail.qcow2 1M
within 30 qemu-io -f qcow2 -c 'write -q -P 170 0 1M' tail.qcow2
within 30 qemu-img resize -q --shrink tail.qcow2 99k
add tail.qcow2
grow 4M || fail "growing a disk that ends within a cluster"
within 30 dd if="$dev" of=got bs=1M iflag=direct status=none
head -c 99k /dev/zero | tr '\0' '\252' >expected
truncate -s 4M expected
cmp got expected || fail "something of the old image has come to light"
del
clean tail.qcow2

# --- what is refused, by name ---
create base.qcow2 8M
create over.qcow2 4M "backing_file=$PWD/base.qcow2,backing_fmt=qcow2"
create bitmap.qcow2 4M
qemu-img bitmap --add bitmap.qcow2 one
create data.qcow2 4M data_file=data.raw
create ro.qcow2 4M
create v2.qcow2 1M compat=0.10,cluster_size=512
while read -r image word options; do
    # shellcheck disable=SC2086 # these are words
    add "$image" $options
    refused 64M "$word"
    del
    clean "$image"
done <<'END'
over.qcow2 backing
bitmap.qcow2 bitmaps
data.qcow2 data --data-file data.raw
ro.qcow2 read-only --read-only
v2.qcow2 version
END
image=none
! within 20 ublk-qcow2 resize -n 99 1G 2>err || fail "resized a device that is not there"
grep -q 'no ublk device 99' err || fail "of a device that is not there: $(<err)"

# --- no room for a longer table ---
image=full.qcow2
mkdir small
within 60 mkfs.xfs -q -f -d size=320m /dev/ram1
within 30 mount /dev/ram1 small
create small/full.qcow2 1G cluster_size=4k
add small/full.qcow2
head -c 1M /dev/urandom >data
within 30 dd if=data of="$dev" bs=1M oflag=direct conv=notrunc,fsync status=none
fallocate -l $(($(df -B 1 --output=avail small | tail -n 1) - (8 << 20))) small/ballast
within 60 dd if=/dev/zero of=small/rest bs=64k oflag=direct status=none 2>/dev/null || true
# 28 MiB of L1 table, and what is reserved is 16 MiB at most.
refused 7T 'No space'
within 30 dd if="$dev" of=got bs=1M count=1 iflag=direct status=none
cmp got data || fail "without room, what was written is not there"
within 30 dd if=data of="$dev" bs=1M oflag=direct conv=notrunc,fsync status=none ||
    fail "without room for a table, nothing can be overwritten any more"
rm small/ballast small/rest
grow 8G || fail "growing with room again"
del
add small/full.qcow2
within 30 dd if="$dev" of=got bs=1M count=1 iflag=direct status=none
cmp got data || fail "a new device has not what was written"
del
sound small/full.qcow2
within 60 umount small
no_devices
