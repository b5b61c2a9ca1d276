#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 180
# memory: 4G
# A disk beneath that hangs for more than 30 s: list, stats and the log say so, once; when it goes
# on, all I/O does, and nothing is stuck any more. And a server that is killed on such a disk while
# it stops can be killed.
source "$(dirname "$0")/lib.sh"

sectors=$((400 * 2048)) # The least of XFS is 300 MiB.
dm create beneath --table "0 $sectors linear /dev/ram1 0"
busybox syslogd -n -O "$PWD/syslog" &
syslog=$!
# Nothing that is left may wait for it.
trap 'status=$?; set +e; timeout 20 dmsetup --noudevsync resume beneath 2>/dev/null; kill $syslog
    (exit $status); on_exit' EXIT
until_true 10 test -S /dev/log
within 60 mkfs.xfs -q -f "$(dm_path beneath)"
mkdir disk
within 30 mount "$(dm_path beneath)" disk
create disk/image.qcow2 64M
add disk/image.qcow2 -q 2
head -c 64K /dev/urandom >cluster
within 30 dd if=cluster of="$dev" bs=64k oflag=direct conv=notrunc,fsync status=none

stuck() { within 20 ublk-qcow2 stats -n "$id" --json | jq -c .stuck; }
is_stuck() { [[ $(stuck) != '[]' ]]; }
none_stuck() { [[ $(stuck) == '[]' ]]; }

none_stuck || fail "stuck from the beginning: $(stuck)"
dm suspend --noflush --nolockfs beneath
dd if=cluster of="$dev" bs=64k seek=1 oflag=direct conv=notrunc,fsync status=none &
writer=$!
sleep 25
none_stuck || fail "stuck after 25 s: $(stuck)"
until_true 15 is_stuck
say "$(stuck)"
kill -0 $writer || fail "the write has ended on a disk that hangs"
stuck | jq -e 'all(.[]; .seconds >= 30 and .count > 0 and .file == "the image")' >/dev/null ||
    fail "what is stuck: $(stuck)"
within 20 ublk-qcow2 list -n "$id" | grep -qE 'stuck: [1-9][0-9]* operations \(.*\) on the image' ||
    fail "list says nothing: $(within 20 ublk-qcow2 list -n "$id")"
within 20 ublk-qcow2 list -n "$id" --json |
    jq -e '.[0] | (.stuck | length) > 0 and .health == "good"' >/dev/null || fail "list --json"
within 20 ublk-qcow2 stats -n "$id" --prometheus |
    grep -qE '^ublk_qcow2_stuck_operations\{.*\} [1-9]' || fail "stats --prometheus"
sleep 2

dm resume beneath
wait $writer || fail "the write failed when the disk went on"
until_true 10 none_stuck
within 30 dd if="$dev" of=got bs=64k skip=1 count=1 iflag=direct status=none
cmp got cluster || fail "what was written on the hanging disk is not there"
begun=$(grep -c "daemon.warn.*device $id: stuck: .* on the image" syslog || true)
ended=$(grep -c "daemon.warn.*device $id: no more stuck: .* on the image, after" syslog || true)
[[ $begun -ge 1 && $begun -le 4 && $begun == "$ended" ]] ||
    fail "$begun lines of the beginning, $ended of the end: $(cat syslog)"
del
clean disk/image.qcow2

# --- a server that waits for the disk in order to stop ---
add disk/image.qcow2
pid=$(daemon_of "$id")
dm suspend --noflush --nolockfs beneath
dd if=cluster of="$dev" bs=64k seek=2 oflag=direct conv=notrunc status=none 2>dd.err &
writer=$!
sleep 1
kill -TERM "$pid"
sleep 1
within 20 ublk-qcow2 list -n "$id" | grep -q "^dev id $id:" || fail "list beside a stop that waits"
kill -KILL "$pid"
sleep 1
dm resume beneath
until_true 20 test ! -e "/proc/$pid"
! wait $writer || say "the write was done all the same"
within 60 ublk-qcow2 del -n "$id" 2>del.err || say "del: $(<del.err)"
gone "$id"
sound disk/image.qcow2
within 60 umount disk
dm remove beneath
no_devices
