#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 300
# memory: 8G
# fio writes and verifies with CRC-32C, and what QEMU then finds in the image is the same as in a
# raw file that the same fio commands wrote. On empty and preallocated images.
# By hand: SCALE=8 for eight times as much, OPTIONS='cluster_size=4k' for other images, ALL=1 for
# all block sizes also on preallocated images.
source "$(dirname "$0")/lib.sh"

SCALE=${SCALE:-1} OPTIONS=${OPTIONS:-}
mib=$((1 << 20))

common() {
    echo "[global]
ioengine=libaio
direct=1
thread=1
randseed=$1
stonewall
group_reporting=0"
}

# Part one, at the start of the image: verification by fio. Its blocks have the time in them, so no
# second file can be the same: verify_jobs BLOCK_SIZE:MIB…
verify_jobs() {
    local bs size depth part
    common 7
    echo "verify=crc32c"
    echo "verify_fatal=1"
    at=0
    for bs; do
        size=$((${bs#*:} * mib * SCALE)) bs=${bs%:*}
        for depth in 1 128; do
            part=$size
            # A fourth of the smallest at depth 1, which is slow.
            [[ $bs != 4k || $depth != 1 ]] || part=$((size / 4))
            printf '[%s]\nrw=%s\nbs=%s\niodepth=%s\noffset=%s\nsize=%s\n' \
                "randwrite-$bs-q$depth" randwrite "$bs" "$depth" $at $part \
                "randread-$bs-q$depth" randread "$bs" "$depth" $at $part \
                "rw-$bs-q$depth" rw "$bs" "$depth" $((at + part)) $part
            at=$((at + 2 * part))
        done
    done
}

# Part two, behind it: contents that depend on the offset and the job alone. Each job overwrites
# some of what the one before wrote.
pattern_jobs() {
    local size=$((4 * mib * SCALE))
    common 11
    echo "verify=pattern"
    printf '[%s]\nrw=randwrite\nbs=4k\niodepth=128\noffset=%s\nsize=%s\nverify_pattern=0xa1%%o\n' \
        pattern-4k-q128 "$1" $size
    printf '[%s]\nrw=randwrite\nbs=64k\niodepth=128\noffset=%s\nsize=%s\nverify_pattern=0xb2%%o\n' \
        pattern-64k-q128 $(($1 + 3 * size / 4 + 4096)) $size
    printf '[%s]\nrw=write\nbs=1m\niodepth=8\noffset=%s\nsize=%s\nverify_pattern=0xc3%%o\n' \
        pattern-1m-q8 $(($1 + 3 * size / 2 + 512)) $size
    # Any length from one sector on, at any sector.
    printf '[%s]\nrw=randwrite\nbssplit=%s\nblockalign=512\niodepth=1\n' \
        pattern-unaligned-q1 512/20:1536/20:4k/20:7k/15:64k/10:66048/10:92160/5
    printf 'norandommap=1\ndo_verify=0\noffset=%s\nsize=%s\nio_size=%s\nverify_pattern=0xd4%%o\n' \
        "$1" $((4 * size)) $((size / 2))
    end=$(($1 + 4 * size))
}

# run JOBS FILE: runs fio, and prints a line for each job.
run() {
    local bad=''
    within 200 fio --output-format=json --output=fio.out --filename="$2" "$1" >fio.err 2>&1 ||
        bad=yes
    # Warnings come before the JSON.
    sed -n '/^{/,$p' fio.out >fio.json
    [[ -z $bad ]] || fail "fio $1 on $2: $(head -c 2000 fio.err) $(head -c 1000 fio.out)
$(jq -c '.jobs[] | select(.error != 0) | {jobname, error}' fio.json)"
    jq -r '.jobs[] | [.jobname, .read.total_ios, .write.total_ios, .error] | @tsv' fio.json |
        awk -v name="$test_name" -v image="$3" \
            '{ printf "%s: %-22s %-20s read %6d written %6d errors %d\n",
                name, image, $1, $2, $3, $4; bad += $4 } END { exit bad > 0 }'
}

block_sizes=(4k:1 64k:4 1m:8)
verify_jobs "${block_sizes[@]}" >off.fio
verify_end=$at
[[ -n ${ALL:-} ]] || block_sizes=(4k:1 1m:8)
verify_jobs "${block_sizes[@]}" | tee metadata.fio >full.fio
pattern_jobs "$verify_end" >pattern.fio
size=$(((end + mib - 1) / mib * mib + 7 * 512))

truncate -s $size pattern.raw
run pattern.fio pattern.raw raw >/dev/null

for preallocation in off metadata full; do
    image=$preallocation.qcow2
    create $image $size "preallocation=$preallocation${OPTIONS:+,$OPTIONS}"
    add $image
    run $preallocation.fio "$dev" $preallocation
    run pattern.fio "$dev" $preallocation
    # What was verified is the shadow of part one.
    cp --reflink=never --sparse=always pattern.raw shadow.raw
    within 100 dd if="$dev" of=shadow.raw bs=1M iflag=direct,count_bytes count="$verify_end" \
        conv=notrunc status=none
    del
    clean $image
    within 100 qemu-img compare -q -f qcow2 -F raw $image shadow.raw ||
        fail "$image and its shadow differ: $(qemu-img compare -f qcow2 -F raw $image shadow.raw)"
    say "$preallocation: clean, and identical to its shadow"
    rm $image shadow.raw
done
no_devices
