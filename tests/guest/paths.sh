#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 420
# cpus: 4
# memory: 8G
# Every data path and delivery that the kernel has, and with several queues: a file system, and writes of four
# jobs at a time that fio verifies, on an image, an overlay and with caches that are much too small.
# By hand: ALL=1 for all of fs.sh and fio-verify.sh on each of them with 1, 2 and 4 queues; with
# DELIVERIES=batch for that alone.
source "$(dirname "$0")/lib.sh"

here=$(cd "$(dirname "$0")" && pwd)
paths=(user-copy copy) deliveries=(single)
if [[ $VM_KERNEL == new ]]; then
    paths=(zero-copy "${paths[@]}") deliveries=(batch single)
else
    # What the kernel does not have is refused, and the next best is taken.
    create image.qcow2 16M
    ! within 60 ublk-qcow2 add -f image.qcow2 --data-path zero-copy 2>err || fail "zero copy served"
    grep -q 'leave --data-path out to use user-copy' err || fail "zero copy: $(<err)"
    ! within 60 ublk-qcow2 add -f image.qcow2 --delivery batch 2>err || fail "batches served"
    grep -q 'leave --delivery out to use single' err || fail "batches: $(<err)"
    rm image.qcow2
fi

# listed JQ VALUE: what list says of the device.
listed() {
    [[ $(ublk-qcow2 list --json -n "$id" | jq -r ".[0].$1") == "$2" ]] ||
        fail "$1 is not $2: $(ublk-qcow2 list --json -n "$id")"
}

if [[ -n ${ALL:-} ]]; then
    ways=()
    # shellcheck disable=SC2086 # these are words
    for delivery in ${DELIVERIES:-${deliveries[@]}}; do
        ways+=("${paths[@]/%/ --delivery $delivery}")
    done
    for way in "${ways[@]}"; do
        for queues in 1 2 4; do
            for script in fs fio-verify; do
                mkdir one
                (cd one && ADD_OPTIONS="--data-path $way -q $queues" bash "$here/$script.sh") ||
                    fail "$script on $way with $queues queues"
                rm -r one
            done
            say "$way with $queues queues: passed"
        done
    done
    exit
fi

# The best is what is used without being asked for, and no more queues than CPUs.
create image.qcow2 64M
within 60 ublk-qcow2 add -f image.qcow2 -n 0 -q 8 >out 2>err || fail "add -q 8: $(<err)"
id=0
grep -q '4 of 8 queues' err || fail "the clamped number of queues is not reported: $(<err)"
listed target.data_path "${paths[0]}"
listed target.delivery "${deliveries[0]}"
listed nr_hw_queues 4
del
rm image.qcow2

# Four jobs of their own parts, and two that share one.
size=$((4 << 20))
{
    echo "[global]
ioengine=libaio
direct=1
thread=1
iodepth=32
verify=crc32c
verify_fatal=1
randseed=3"
    for job in 0 1 2 3; do
        printf '[job-%s]\nrw=randrw\nbssplit=4k/60:512/10:64k/20:300k/10\nblockalign=512\n' $job
        printf 'offset=%s\nsize=%s\n' $((job * size)) $size
    done
    printf '[trim]\nrw=randtrimwrite\nbs=64k\noffset=%s\nsize=%s\nverify=0\n' $((4 * size)) $size
} >jobs.fio

case_of() {
    local image=$1
    shift
    add "$image" "$@"
    within 200 fio --output=fio.out --filename="$dev" jobs.fio >fio.err 2>&1 ||
        fail "$image $*: $(head -c 2000 fio.err) $(tail -c 2000 fio.out)"
    dd if="$dev" bs=1M iflag=direct status=none | sha256sum >through
    del
    clean "$image"
    within 100 qemu-img convert -f qcow2 -O raw "$image" out.raw
    sha256sum <out.raw >outside
    cmp -s through outside || fail "$image $*: what was read is not what is in the image"
    rm out.raw
}

head -c $((24 << 20)) /dev/urandom >base.raw
for path in "${paths[@]}"; do
    for queues in 1 2 4; do
        create image.qcow2 24M
        case_of image.qcow2 --data-path "$path" -q $queues
        qemu-img create -q -f qcow2 -F raw -b base.raw -o extended_l2=on overlay.qcow2
        case_of overlay.qcow2 --data-path "$path" -q $queues
        create small.qcow2 24M cluster_size=4k
        case_of small.qcow2 --data-path "$path" -q $queues --stress --depth 16
        rm image.qcow2 overlay.qcow2 small.qcow2
        say "$path with $queues queues: verified"
    done
    mkdir "$path"
    (cd "$path" && FILES=100 MIB=5 ADD_OPTIONS="--data-path $path -q 4" bash "$here/fs.sh") ||
        fail "a file system on $path with 4 queues"
    rm -r "$path"
done
if [[ ${deliveries[0]} == batch ]]; then
    # All of the above were in batches. The other way too, with less of it.
    for path in "${paths[@]}"; do
        create image.qcow2 24M cluster_size=4k
        case_of image.qcow2 --data-path "$path" --delivery single -q 2 --depth 32
        rm image.qcow2
        say "$path, one request at a time: verified"
    done
    # A depth above what is delivered at a time, and of a single tag, which is none for batches.
    create image.qcow2 24M
    case_of image.qcow2 --depth 300
    refused 'leave --delivery out' -- ublk-qcow2 add -f image.qcow2 --depth 1 --delivery batch
    add image.qcow2 --depth 1
    listed target.delivery single
    within 30 dd if=base.raw of="$dev" bs=1M count=4 oflag=direct conv=notrunc,fsync status=none
    within 30 cmp -n $((4 << 20)) base.raw "$dev" || fail "a depth of 1"
    del
    clean image.qcow2
    rm image.qcow2
fi
no_devices
