#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 120
# memory: 8G
# QEMU's image locks, in both directions, and between two of our own.
source "$(dirname "$0")/lib.sh"

create image.qcow2 64M
create other.qcow2 64M

# qemu_holds OPTION…: a QEMU process has image.qcow2 open from here on; qemu_ends ends it.
qemu_holds() {
    mkfifo commands answers
    qemu-io -f qcow2 "$@" image.qcow2 <commands >answers 2>&1 &
    qemu=$!
    exec {to_qemu}>commands {from_qemu}<answers
    echo length >&"$to_qemu"
    local line=''
    until [[ $line == *"64 MiB"* ]]; do
        read -r -t 20 -u "$from_qemu" line || fail "qemu-io $* does not answer"
    done
}
qemu_ends() {
    echo quit >&"$to_qemu"
    wait "$qemu"
    exec {to_qemu}>&- {from_qemu}<&-
    rm commands answers
}

# qemu_refused COMMAND…: fails over a lock; the message is left in message.
qemu_refused() {
    local status=0
    message=$(within 30 "$@" 2>&1 </dev/null) || status=$?
    [[ $status != 0 && $message == *'Failed to get '*' lock'* ]] ||
        fail "'$*' should fail over a lock, but: status $status, $message"
}

in_use='in use'

say 'beside QEMU that writes'
qemu_holds
qemu_refused qemu-img info -f qcow2 image.qcow2
beside_qemu=$message
refused image.qcow2 "$in_use" -- ublk-qcow2 add -f image.qcow2
refused image.qcow2 "$in_use" -- ublk-qcow2 add -f image.qcow2 --read-only
qemu_ends

say 'beside QEMU that reads'
qemu_holds -r
refused image.qcow2 "$in_use" -- ublk-qcow2 add -f image.qcow2
add image.qcow2 --read-only
del
qemu_ends
no_devices

say 'served for writing'
add image.qcow2
served=$id
qemu_refused qemu-img info -f qcow2 image.qcow2
[[ $message == "$beside_qemu" ]] || fail "beside QEMU: $beside_qemu; beside us: $message"
within 30 qemu-img info -U -f qcow2 image.qcow2 >/dev/null || fail "info -U does not work"
qemu_refused qemu-img check -f qcow2 image.qcow2
qemu_refused qemu-io -f qcow2 -c length image.qcow2
refused image.qcow2 "$in_use" -- ublk-qcow2 add -f image.qcow2
refused image.qcow2 "$in_use" -- ublk-qcow2 add -f image.qcow2 --read-only
# Another image is none of its business.
add other.qcow2
del
del_number "$served"
within 30 qemu-img info -f qcow2 image.qcow2 >/dev/null || fail "locked after del"

say 'served for reading'
add image.qcow2 --read-only
first=$id
within 30 qemu-img info -f qcow2 image.qcow2 >/dev/null || fail "info should share a reader's image"
qemu_refused qemu-io -f qcow2 -c length image.qcow2
add image.qcow2 --read-only
refused image.qcow2 "$in_use" -- ublk-qcow2 add -f image.qcow2
del
del_number "$first"

say 'after kill -9'
add image.qcow2
kill_daemon KILL "$id"
start=${EPOCHREALTIME/./}
until_true 10 unlocked image.qcow2
say "unlocked after $(((${EPOCHREALTIME/./} - start) / 1000)) ms"
within 60 ublk-qcow2 del -n "$id" || fail "del of the dead device failed"
gone "$id"
add image.qcow2
del
no_devices
