#!/usr/bin/env bash
# What a guest FLUSH costs: fdatasyncs of the image for each, and flushes of the disk beneath,
# beside those that a raw sparse file needs under the same fio on the same disk.
# kernels: new
# disk: yes
# timeout: 300
source "$(dirname "$0")/lib.sh"

WRITES=${WRITES:-400}
jobs=$(cd "$(dirname "$0")/../../fio" && pwd)
flushes() { awk '{ print $16 }' "/sys/block/$VM_DISK/stat"; }
stat_of() { ublk-qcow2 list -n "$id" --json | jq ".[0].stats.$1"; }

# run FILE: the workload of every measurement here.
run() {
    within 120 fio "$jobs/fsync-4k-q1.fio" --filename="$1" --number_ios="$WRITES" \
        --output-format=json >fio.json || fail "fio on $1: $(head -c 500 fio.json)"
    syncs=$(jq '.jobs[0].sync.total_ios' fio.json)
    ((syncs >= WRITES / 2)) || fail "fio did $syncs fsyncs only"
}

ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", a / b }'; }
at_most() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a <= b) }'; }

truncate -s 256M raw
sync -f .
before=$(flushes)
run raw
raw=$(ratio $(($(flushes) - before)) "$syncs")
say "raw sparse file: $raw flushes of $VM_DISK per fsync"

# measure NAME IMAGE MOST: at most MOST fdatasyncs per FLUSH, and 1.10 times the raw file's flushes.
measure() {
    local name=$1 image=$2 most=$3 cost disk
    add "$image"
    if [[ $name == full ]]; then
        within 120 fio --name=fill --filename="$dev" --direct=1 --rw=write --bs=512k --size=256M \
            --ioengine=libaio --iodepth=4 >/dev/null || fail "filling $image"
    fi
    sync -f .
    sleep 1
    local disk_before syncs_before flushes_before
    disk_before=$(flushes) syncs_before=$(stat_of syncs) flushes_before=$(stat_of flushes)
    run "$dev"
    disk=$(ratio $(($(flushes) - disk_before)) "$syncs")
    sleep 1
    cost=$(ratio $(($(stat_of syncs) - syncs_before)) $(($(stat_of flushes) - flushes_before)))
    say "$name: $cost fdatasyncs per FLUSH (at most $most)," \
        "$disk flushes of $VM_DISK per fsync ($(ratio "$disk" "$raw") times the raw file's)"
    at_most "$cost" "$most" || bad+=" $name:fdatasync=$cost"
    at_most "$(ratio "$disk" "$raw")" 1.10 || bad+=" $name:flushes=$disk"
    del
    within 30 qemu-img check -q "$image" || fail "qemu-img check of $image"
}

bad=""
create full.qcow2 256M preallocation=full
measure full full.qcow2 1.05
create empty.qcow2 256M preallocation=off
measure empty empty.qcow2 1.10
head -c 256M /dev/zero | tr '\0' x >base.raw
qemu-img create -q -f qcow2 -b base.raw -F raw overlay.qcow2
measure overlay overlay.qcow2 2.1
# What was not written shines through: x from beneath, y from fio, and nothing else.
within 60 qemu-img convert -O raw overlay.qcow2 overlay.raw
others=$(tr -d xy <overlay.raw | wc -c)
written=$(tr -d x <overlay.raw | wc -c)
say "overlay: $written bytes written, $others bytes that nobody wrote"
((others == 0 && written >= WRITES * 2048)) || fail "the overlay's contents are wrong"
[[ -z $bad ]] || fail "too many:$bad"
no_devices
