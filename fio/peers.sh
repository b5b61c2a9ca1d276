# shellcheck shell=bash
# How each peer serves an image: start_NAME IMAGE [OPTION…] leaves the device in dev and the number
# of the process that serves it in server (or nothing), stop_NAME ends it. Sourced by fio/guest.

# None of them may take longer to start.
limited() { timeout -k 5 60 "$@"; }

# Waits for a block device.
wait_for() {
    local _
    for _ in {1..100}; do
        [[ -b $1 ]] && return 0
        sleep 0.1
    done
    return 1
}

start_ours() {
    dev=$(limited ublk-qcow2 add -f "$@") || return 1
    server=$(ublk-qcow2 list --json | jq -r '.[0].daemon_pid')
}
stop_ours() { ublk-qcow2 del -a; }

start_nbd() {
    dev=/dev/nbd0 server=''
    limited qemu-nbd --fork --persistent --pid-file="$PWD/nbd.pid" -c "$dev" -f qcow2 --cache=none \
        --aio="$1" --discard=unmap "$2" || return 1
    server=$(cat nbd.pid)
    for _ in {1..100}; do
        (($(cat /sys/block/nbd0/size) > 0)) && return 0
        sleep 0.1
    done
    return 1
}
start_nbd-native() { start_nbd native "$1"; }
start_nbd-uring() { start_nbd io_uring "$1"; }
stop_nbd-native() { qemu-nbd -d /dev/nbd0 >/dev/null; ended "$server"; }
stop_nbd-uring() { stop_nbd-native; }

start_vduse() {
    local before queue=num-queues=1,queue-size=128
    before=$(compgen -G '/dev/vd?' | sort || true)
    limited qemu-storage-daemon --daemonize --pidfile "$PWD/vduse.pid" \
        --blockdev "driver=file,filename=$1,node-name=file,cache.direct=on,aio=io_uring" \
        --blockdev driver=qcow2,file=file,node-name=disk,discard=unmap,cache.direct=on \
        --export type=vduse-blk,id=export,node-name=disk,name=vduse0,writable=on,$queue ||
        return 1
    server=$(cat vduse.pid)
    limited vdpa dev add name vduse0 mgmtdev vduse || return 1
    for _ in {1..100}; do
        dev=$(comm -13 <(echo "$before") <(compgen -G '/dev/vd?' | sort) | head -n 1)
        [[ -z $dev ]] || return 0
        sleep 0.1
    done
    return 1
}
stop_vduse() {
    vdpa dev del vduse0
    kill "$server"
    ended "$server"
}

start_rublk() {
    # It prints the device's number and its own, and stays behind as a daemon.
    limited rublk add "$@" >rublk.out 2>&1 || return 1
    dev=/dev/ublkb$(sed -n 's/^dev id \([0-9]*\):.*/\1/p' rublk.out | head -n 1)
    server=$(sed -n 's/.*daemon pid \([0-9]*\).*/\1/p' rublk.out | head -n 1)
    [[ -n $server ]] && wait_for "$dev"
}
stop_rublk() { rublk del --all >/dev/null 2>&1 || rublk del -n 0 >/dev/null; }
start_rublk-qcow2() { start_rublk qcow2 -q 1 -d 128 -f "$1"; }
start_rublk-loop() { start_rublk loop -q 1 -d 128 -f "$1"; }
start_rublk-loop-zc() { start_rublk loop -q 1 -d 128 --zero-copy -f "$1"; }
start_null() { start_rublk null -q 1 -d 128; }
stop_rublk-qcow2() { stop_rublk; }
stop_rublk-loop() { stop_rublk; }
stop_rublk-loop-zc() { stop_rublk; }
stop_null() { stop_rublk; }

start_raw() { dev=$1 server=''; }
stop_raw() { :; }

ended() {
    local _
    for _ in {1..100}; do
        [[ -e /proc/$1 ]] || return 0
        sleep 0.1
    done
    return 1
}
