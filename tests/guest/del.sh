#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 300
# memory: 8G
# del in every state of a device: idle, under load, mounted, its server stopped by SIGSTOP (idle and
# under load), its server killed. It ends within its limit, 15 s idle and 60 s under load, with a
# clear word and a status that says whether the image was closed.
source "$(dirname "$0")/lib.sh"

# What an emulated, shared machine takes besides.
SLACK=5
create image.qcow2 256M
mkdir mnt

# ends LIMIT STATUS PHRASE COMMAND…: with this status, and one line with the phrase, if any.
ends() {
    local limit=$1 expected=$2 phrase=$3 began=${EPOCHREALTIME/./} status=0 took
    shift 3
    within $((limit + 30)) "$@" >del.out 2>del.err || status=$?
    took=$(((${EPOCHREALTIME/./} - began) / 1000))
    [[ $status == "$expected" ]] || fail "$what: '$*' ended with $status: $(<del.err)"
    [[ ! -s del.out && $(wc -l <del.err) -le 1 ]] || fail "$what: $(cat del.out del.err)"
    [[ $(<del.err) == *"$phrase"* ]] || fail "$what: '$*' should mention '$phrase': $(<del.err)"
    ((took <= (limit + SLACK) * 1000)) || fail "$what: '$*' took $took ms"
    say "$what: $took ms; $(<del.err)"
}
load() {
    timeout -k 5 120 fio --name=load --filename="$dev" --rw=randwrite --bs=4k --ioengine=libaio \
        --iodepth=64 --direct=1 --time_based --runtime=100 --size=256M --output=fio.out >fio.err \
        2>&1 &
    load=$!
    # Once there is something under way.
    until_true 60 under_way
}
under_way() { (($(awk '{ print $9 }' "/sys/block/ublkb$id/stat") > 0)); }
# A load whose device goes ends by itself.
load_ends() {
    until_true 60 eval '! kill -0 $load 2>/dev/null'
    wait $load || true
}
closed() {
    gone "$id"
    no_devices
    until_true 30 unlocked image.qcow2
    sound image.qcow2
    [[ $1 == sound || $leaks == 0 ]] || fail "$what: closed with $leaks leaks"
}

what=idle
add image.qcow2
ends 15 0 '' ublk-qcow2 del -n "$id"
closed clean

what='under load'
add image.qcow2
load
ends 15 1 'in use' ublk-qcow2 del -n "$id"
ends 60 0 '' ublk-qcow2 del -n "$id" --force
load_ends
closed clean

what=mounted
add image.qcow2
within 60 mkfs.ext4 -q "$dev"
within 30 mount "$dev" mnt
dd if=/dev/urandom of=mnt/file bs=1M count=4 status=none
ends 15 1 'unmount' ublk-qcow2 del -n "$id"
ends 60 0 '' ublk-qcow2 del -n "$id" --force
within 60 umount mnt
closed clean

what='a stopped server, idle'
add image.qcow2
pid=$(daemon_of "$id")
kill -STOP "$pid"
[[ $(health "$id") == *'does not answer'* ]] || fail "$what: health is '$(health "$id")'"
ends 15 1 "kill -CONT $pid" ublk-qcow2 del -n "$id"
# It was told, and does it when it can.
kill -CONT "$pid"
closed clean

what='a stopped server, under load'
add image.qcow2
load
pid=$(daemon_of "$id")
kill -STOP "$pid"
ends 15 1 'in use' ublk-qcow2 del -n "$id"
# Where nothing moves the load is no reason to wait longer.
ends 15 1 "kill -CONT $pid" ublk-qcow2 del -n "$id" --force
# Nobody will let it go on: then it can be killed, and the device still goes.
kill -KILL "$pid"
until_true 30 eval '[[ ! -e /proc/$pid ]]'
ends 15 0 '' ublk-qcow2 del -n "$id" --force
load_ends
closed sound

what='a killed server, under load'
add image.qcow2
load
kill_daemon KILL "$id"
ends 15 0 '' ublk-qcow2 del -n "$id" --force
load_ends
closed sound

what='a killed server, mounted'
add image.qcow2
within 60 mkfs.ext4 -q "$dev"
within 30 mount "$dev" mnt
kill_daemon KILL "$id"
ends 15 0 '' ublk-qcow2 del -n "$id" --force
within 60 umount mnt
closed sound
no_devices
