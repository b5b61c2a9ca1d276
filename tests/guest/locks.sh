#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 240
# memory: 8G
# QEMU's image locks, in both directions, and between two of our own; on an image that is written
# to or only read, on the file beneath it, and on its data file.
source "$(dirname "$0")/lib.sh"

create image.qcow2 64M
create other.qcow2 64M

# qemu_holds OPTION…: a QEMU process has image.qcow2, or what the options name, open from here on;
# qemu_ends ends it.
qemu_holds() {
    mkfifo commands answers
    [[ $* == *-f* ]] || set -- -f qcow2 "$@" image.qcow2
    qemu-io "$@" <commands >answers 2>&1 &
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

# Each file beside an image with its permission, held by QEMU: taken by us; held by us: by QEMU.
create base.qcow2 64M
create overlay.qcow2 64M backing_file=base.qcow2,backing_fmt=qcow2
within 60 qemu-img create -q -f qcow2 -o data_file=data.raw split.qcow2 64M

say 'a backing file that QEMU writes, or reads'
qemu_holds -f qcow2 base.qcow2
for mode in '' --read-only; do
    refused base.qcow2 "$in_use" -- ublk-qcow2 add -f overlay.qcow2 $mode
done
qemu_ends
qemu_holds -r -f qcow2 base.qcow2
for mode in '' --read-only; do
    # shellcheck disable=SC2086 # no option is no word
    add overlay.qcow2 $mode
    del
done
qemu_ends

say 'a backing file beneath what we serve'
for mode in '' --read-only; do
    # shellcheck disable=SC2086
    add overlay.qcow2 $mode
    qemu_refused qemu-io -f qcow2 -c length base.qcow2
    refused base.qcow2 "$in_use" -- ublk-qcow2 add -f base.qcow2
    first=$id
    within 30 qemu-io -r -f qcow2 -c length base.qcow2 >/dev/null || fail "readers share it"
    within 30 qemu-img info -f qcow2 base.qcow2 >/dev/null || fail "info should share it"
    add base.qcow2 --read-only
    del
    del_number "$first"
done
# An overlay that QEMU uses holds its base in the same way.
qemu_holds -f qcow2 overlay.qcow2
refused base.qcow2 "$in_use" -- ublk-qcow2 add -f base.qcow2
add base.qcow2 --read-only
del
qemu_ends

say 'a data file'
split=(split.qcow2 --data-file data.raw)
qemu_holds -f qcow2 split.qcow2
refused split.qcow2 "$in_use" -- ublk-qcow2 add -f "${split[@]}"
refused split.qcow2 "$in_use" -- ublk-qcow2 add -f "${split[@]}" --read-only
qemu_ends
qemu_holds -f raw data.raw
for mode in '' --read-only; do
    refused data.raw "$in_use" -- ublk-qcow2 add -f "${split[@]}" $mode
done
qemu_ends
qemu_holds -r -f raw data.raw
add "${split[@]}"
del
add "${split[@]}" --read-only
del
qemu_ends
add "${split[@]}"
qemu_refused qemu-io -f raw -c length data.raw
qemu_refused qemu-io -f qcow2 -c length split.qcow2
within 30 qemu-io -r -f raw -c length data.raw >/dev/null || fail "a reader of the data file"
within 30 ublk-qcow2 add -f "${split[@]}" --read-only 2>err && fail "two of ours share it"
del
add "${split[@]}" --read-only
qemu_refused qemu-io -f raw -c length data.raw
within 30 qemu-io -r -f raw -c length data.raw >/dev/null || fail "readers share the data file"
del

say 'without locks'
qemu_holds
add image.qcow2 --read-only --lock off
del
refused image.qcow2 "$in_use" -- ublk-qcow2 add -f image.qcow2 --lock auto
qemu_ends

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
