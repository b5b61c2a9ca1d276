#!/usr/bin/env bash
# kernels: old new
# disk: yes
# timeout: 120
# memory: 8G
# A guest fsync reaches the disk: flushes that the disk under the image has seen, per fsync.
source "$(dirname "$0")/lib.sh"

WRITES=${WRITES:-100}
[[ -n ${VM_DISK:-} ]] || fail "needs --disk"
[[ $(cat "/sys/block/$VM_DISK/queue/write_cache") == "write back" ]] ||
    fail "$VM_DISK has no write cache, so nobody would flush it"

# Field 16: flush requests that the disk has completed.
flushes() { awk '{ print $16 }' "/sys/block/$VM_DISK/stat"; }

measure() {
    local image=$1.qcow2 before after syncs
    create "$image" 64M "preallocation=$1"
    add "$image"
    sync -f .
    before=$(flushes)
    within 60 fio --name=fsync --filename="$dev" --direct=1 --ioengine=libaio --iodepth=1 \
        --rw=randwrite --bs=4k --fsync=1 --size=64M --number_ios="$WRITES" \
        --output-format=json >fio.json ||
        fail "fio on $image: $(head -c 1000 fio.json)"
    after=$(flushes)
    syncs=$(jq '.jobs[0].sync.total_ios' fio.json)
    ((syncs >= WRITES / 2)) || fail "fio did $syncs fsyncs only"
    say "preallocation=$1: $syncs fsyncs, $((after - before)) flushes of $VM_DISK:" \
        "$(awk -v f=$((after - before)) -v s="$syncs" 'BEGIN { printf "%.2f", f / s }') per fsync"
    ((after - before >= syncs)) || fail "less than one flush per fsync"
    del
    clean "$image"
    rm "$image"
}

measure off
measure full
no_devices
