#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 240
# memory: 8G
# The life of a device: add, list, del, signals, busy devices, read-only ones, a full disk.
source "$(dirname "$0")/lib.sh"

# write_blocks DEVICE COUNT [SKIP]: blocks of 64 KiB of random bytes, and an fsync.
write_blocks() {
    within 60 dd if=/dev/urandom of="$1" bs=64k count="$2" seek="${3:-0}" oflag=direct \
        conv=fsync,notrunc status=none
}
# first_blocks DEVICE COUNT: checksum of its first blocks of 64 KiB.
first_blocks() {
    within 60 dd if="$1" bs=64k count="$2" iflag=direct status=none | sha256sum
}

create image.qcow2 256M

say 'add and del, five times'
before=''
for round in {1..5}; do
    add image.qcow2
    # Usable at once.
    within 20 dd if="$dev" of=/dev/null bs=4k count=1 iflag=direct status=none
    [[ -z $before || $(first_blocks "$dev" 4) == "$before" ]] || fail "round $round: wrong content"
    write_blocks "$dev" 4
    before=$(first_blocks "$dev" 4)
    del
    clean image.qcow2
done
no_devices

say 'list and features'
within 20 ublk-qcow2 features >features.txt
[[ -s features.txt ]] || fail "features says nothing"
[[ -z $(within 20 ublk-qcow2 list) ]] || fail "list shows a device where there is none"
[[ $(within 20 ublk-qcow2 list --json | jq length) == 0 ]] || fail "list --json: no empty array"
create second.qcow2 64M cluster_size=4k
add image.qcow2 -n 3 -d 32
first=$id
add second.qcow2 --block-size 4096
[[ $first == 3 ]] || fail "add -n 3 made device $first"
within 20 ublk-qcow2 list >list.txt
cat list.txt
for line in 'dev id 3: nr_hw_queues 1 queue_depth 32 block size 512 dev_capacity 524288' \
    "dev id $id: nr_hw_queues 1 queue_depth 128 block size 4096 dev_capacity 131072"; do
    grep -q "^$line" list.txt || fail "list has no line '$line'"
done
pattern='^[[:space:]]max rq size [0-9]+ daemon pid [0-9]+ flags 0x[0-9a-f]+ state LIVE$'
[[ $(grep -cE "$pattern" list.txt) == 2 ]] || fail "list: no lines with max rq size … state LIVE"
within 20 ublk-qcow2 list --json >json
jq -e 'length == 2 and all(.[]; .state == "LIVE" and .daemon_pid > 1 and .health == "good")' json \
    >/dev/null || fail "list --json: $(cat json)"
within 20 ublk-qcow2 list -n 3 --json | jq -e 'length == 1 and .[0].dev_id == 3' >/dev/null ||
    fail "list -n 3 --json"
[[ $(blockdev --getss "$dev") == 4096 && $(blockdev --getss /dev/ublkb3) == 512 ]] ||
    fail "logical block sizes"
[[ $(blockdev --getpbsz /dev/ublkb3) == 4096 ]] || fail "physical block size"
[[ $(cat /sys/block/ublkb3/queue/write_cache) == 'write back' ]] || fail "no volatile cache"
[[ $(cat /sys/block/ublkb3/queue/fua) == 1 ]] || fail "no FUA"
within 90 ublk-qcow2 del -a || fail "del -a"
gone 3
gone "$id"
no_devices

say 'what keeps a server from waiting for itself'
add image.qcow2
pid=$(daemon_of "$id")
locked=$(sed -n 's/^VmLck:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/$pid/status")
((locked > 1000)) || fail "only $locked KiB of the server's memory are locked"
[[ $(<"/proc/$pid/oom_score_adj") == -1000 ]] || fail "the server may be killed for want of memory"
# PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE, of PR_SET_IO_FLUSHER: proc(5), the 9th field.
flags=$(awk '{ print $9 }' "/proc/$pid/stat")
(((flags & 0x180000) == 0x180000)) || fail "the server is no I/O flusher: flags $flags"
processes=("$pid")
for status in /proc/[0-9]*/status; do
    if grep -qs "^PPid:[[:space:]]*$pid$" "$status"; then
        process=${status#/proc/}
        processes+=("${process%/status}")
    fi
done
((${#processes[@]} == 3)) || fail "a server has two processes that send commands: ${processes[*]}"
for process in "${processes[@]}"; do
    mounts=$(awk '{ print $5 }' "/proc/$process/mountinfo" | sort -u | tr '\n' ' ')
    [[ $mounts == '/ /dev /run/ublk-qcow2 ' ]] || fail "process $process has the mounts $mounts"
    [[ $(<"/proc/$process/oom_score_adj") == -1000 ]] || fail "process $process may be killed"
done
del

say 'partitions'
create parts.qcow2 16M
add parts.qcow2
# One partition of type 0x83, 4096 sectors from sector 2048 on.
{
    head -c 446 /dev/zero
    printf '\0\0\0\0\x83\0\0\0\0\x08\0\0\0\x10\0\0'
    head -c 48 /dev/zero
    printf '\x55\xaa'
} >mbr
within 20 dd if=mbr of="$dev" bs=512 oflag=direct conv=fsync,notrunc status=none
del
add parts.qcow2
if [[ $VM_KERNEL == new ]]; then
    [[ ! -e ${dev}p1 ]] || fail "the kernel has looked for partitions"
    within 20 partx -a "$dev"
    until_true 5 test -b "${dev}p1"
fi
del
add parts.qcow2 --partscan
until_true 5 test -b "${dev}p1"
del
clean parts.qcow2

say 'busy devices'
add image.qcow2
exec {hold}<"$dev"
refused "$id" open -- ublk-qcow2 del -n "$id"
first_blocks "$dev" 4 >/dev/null || fail "a refused del harmed the device"
exec {hold}<&-
within 60 mkfs.ext4 -q "$dev"
mkdir mnt
within 30 mount "$dev" mnt
refused "$id" -- ublk-qcow2 del -n "$id"
cp features.txt mnt/
sync -f mnt
within 90 ublk-qcow2 del -n "$id" --force || fail "del --force"
within 60 umount mnt
gone "$id"
sound image.qcow2
add image.qcow2
within 30 mount "$dev" mnt
cmp features.txt mnt/features.txt || fail "what was synced before del --force is not there"
within 60 umount mnt
del
clean image.qcow2

say 'signals'
for signal in TERM INT; do
    add image.qcow2
    write_blocks "$dev" 4 100
    before=$(first_blocks "$dev" 104)
    kill_daemon $signal "$id"
    gone "$id"
    until_true 30 unlocked image.qcow2
    clean image.qcow2
    add image.qcow2
    [[ $(first_blocks "$dev" 104) == "$before" ]] || fail "SIG$signal lost what was written"
    del
done
# Under load, and in the foreground.
set -m
ublk-qcow2 add --foreground -f image.qcow2 >out 2>err &
server=$!
set +m
until_true 30 grep -q '^/dev/ublkb' out
dev=$(cat out) id=${dev#/dev/ublkb}
kill -0 $server || fail "--foreground did not stay"
dd if=/dev/urandom of="$dev" bs=64k oflag=direct status=none 2>dd.err &
writer=$!
sleep 0.5
kill -INT $server
wait $server || fail "the server ended with status $?: $(cat err)"
wait $writer || true
gone "$id"
clean image.qcow2
no_devices

say 'read-only'
add image.qcow2 --read-only
[[ $(blockdev --getro "$dev") == 1 ]] || fail "the device is not read-only"
before=$(sum image.qcow2)
! write_blocks "$dev" 1 2>/dev/null || fail "a read-only device was written to"
first_blocks "$dev" 4 >/dev/null
del
[[ $(sum image.qcow2) == "$before" ]] || fail "a read-only image was changed"

full_disk() {
    local what=$1 device start=$SECONDS
    create small/image.qcow2 64M
    add small/image.qcow2
    device=$dev
    write_blocks "$device" 16
    before=$(first_blocks "$device" 16)
    if within 60 dd if=/dev/zero of="$device" bs=64k seek=16 oflag=direct conv=fsync \
        status=none 2>dd.err; then
        fail "$what: 64 MiB fit in less"
    fi
    grep -qE 'No space left|Input/output error' dd.err || fail "$what: $(cat dd.err)"
    [[ $(first_blocks "$device" 16) == "$before" ]] || fail "$what: what was there cannot be read"
    # May say that closing failed, but does not hang.
    within 90 ublk-qcow2 del -n "$id" 2>del.err || say "$what: del says: $(cat del.err)"
    gone "$id"
    sound small/image.qcow2
    say "$what: $(cat dd.err); $leaks leaks, $((SECONDS - start)) s"
}
after_full_disk() {
    add small/image.qcow2
    [[ $(first_blocks "$dev" 16) == "$before" ]] || fail "what was there is not after add"
    write_blocks "$dev" 16 512
    del
    sound small/image.qcow2
    within 60 umount small
}

say 'a full disk'
mkdir small
mount -t tmpfs -o size=16M tmpfs small
full_disk tmpfs
mount -o remount,size=128M small
after_full_disk
# The same on XFS, where there is more to be allocated than data.
blockdev --getsize64 /dev/ram1 >/dev/null
within 60 mkfs.xfs -q -f -d size=320m /dev/ram1
mount /dev/ram1 small
fallocate -l $(($(df -B 1 --output=avail small | tail -n 1) - (16 << 20))) small/ballast
full_disk xfs
rm small/ballast
after_full_disk
no_devices
