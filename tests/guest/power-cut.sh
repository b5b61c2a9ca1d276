#!/usr/bin/env bash
# kernels: new
# disk: no
# timeout: 300
# memory: 8G
# Power cuts: two images on an XFS whose every write goes through dm-log-writes; ext4, fio and fsync
# above one, fio and the recorder above the other. Then the log is replayed to some of its FLUSH and
# FUA entries, and from each of these states: both checks find leaks at most, what was fsynced until
# then is whole, and ext4 needs no repair.
# By hand: POINTS=200 WORK=60, SEED=N, VERBOSE=1; longer than the limit, so without guest-runner:
#   tests/vm/run --timeout 3600 -- env POINTS=200 WORK=60 bash -c \
#       'cd $VM_SCRATCH && exec "$0"' $PWD/tests/guest/power-cut.sh
# After a failure RECORDING and ENTRIES are printed, which check entries of the saved log again.
source "$(dirname "$0")/lib.sh"

POINTS=${POINTS:-10} WORK=${WORK:-12} SEED=${SEED:-$((SRANDOM % 1000000))}
RANDOM=$SEED
MIB=320 # The least of XFS is 300.
sectors=$((MIB * 2048))
data=/dev/ram1 log=/dev/ram2 state=/dev/ram3
formats=('' cluster_size=4k compat=v2 lazy_refcounts=on preallocation=metadata cluster_size=2M)
entry='' recording=$PWD/recording

# Keeps what is needed to check an entry again: once, since this may be called from a subshell.
fail() {
    echo "$test_name: FAIL: $*" >&2
    [[ -z $entry ]] || {
        local kept=${RECORDING:-$VM_OUT/$test_name}
        [[ -e $kept ]] || { cp -r "$recording" "$kept" && copy_log "$kept/log"; } || true
        echo "$test_name: SEED=$SEED, entry $entry; again: tests/vm/run --kernel new -- env" \
            "RECORDING=$kept ENTRIES=$entry tests/vm/guest-runner tests/guest/$test_name.sh" >&2
    }
    exit 1
}

# Only as much of the log as was written.
copy_log() {
    within 100 dd if="$log" of="$1" bs=1M count=$((log_sectors / 2048 + 8)) conv=sparse status=none
}

# A RAM disk has zeros where it was discarded.
empty() { within 60 blkdiscard -f "$1" 2>discard.err || fail "blkdiscard: $(<discard.err)"; }

# create_dm NAME TABLE: leaves the device's path in mapped.
create_dm() {
    dm create "$1" --table "$2"
    mapped=$(dm_path "$1")
}
mark() { dm message recorded 0 mark "$1"; }

# --- the work that is recorded ------------------------------------------------------------------

# Files with an fsync each, until the time is up. What is known to be durable is a mark in the log:
# the number of files, and of lines in the recorder's log.
write_files() {
    local end=$((SECONDS + WORK)) blocks first lines
    files=0
    while ((SECONDS < end)); do
        blocks=$((1 + RANDOM % (RANDOM % 4 ? 16 : 128))) first=$((RANDOM % 896))
        ((files % 3)) || rm -f fs/junk
        dd if=pool of="fs/file$files" bs=4k skip=$first count=$blocks conv=fsync status=none
        echo "file$files $first $blocks" >>recording/files
        lines=$(wc -l <recording/recorder)
        files=$((files + 1))
        mark "durable,$files,$lines"
        ((files % 3)) || dd if=pool of=fs/junk bs=64k count=$((1 + RANDOM % 32)) status=none
    done
}

record() {
    local format_a format_b id_a dev_a dev_b fio recorder status path name first blocks
    empty $data
    create_dm recorded "0 $sectors log-writes $data $log"
    within 60 mkfs.xfs -q -f -K "$mapped"
    mkdir disk fs
    within 30 mount "$mapped" disk
    format_a=${formats[RANDOM % ${#formats[@]}]} format_b=${formats[RANDOM % ${#formats[@]}]}
    create disk/a.qcow2 64M "$format_a"
    create disk/b.qcow2 64M "$format_b"
    within 60 sync -f disk
    mark created
    say "SEED=$SEED: ext4 on '${format_a:-default}', raw on '${format_b:-default}'"

    add disk/a.qcow2
    id_a=$id dev_a=$dev
    add disk/b.qcow2
    dev_b=$dev
    within 60 mkfs.ext4 -q -F "$dev_a"
    within 30 mount -o discard "$dev_a" fs
    within 60 sync -f fs
    mark formatted
    head -c 4M /dev/urandom >pool
    : >recording/recorder
    : >recording/files

    within $((WORK + 60)) fio --ioengine=psync --rw=randwrite --bs=4k --time_based \
        --runtime="$WORK" --rate_iops=40 \
        --name=file --filename="$PWD/fs/fio" --size=8M --fsync=4 \
        --name=raw --filename="$dev_b" --direct=1 --offset=16M --size=48M --fsync=8 \
        --output-format=json --output=fio.json >fio.err 2>&1 &
    fio=$!
    nice recorder write --device "$dev_b" --log recording/recorder --seed "$SEED" \
        --span $((16 << 20)) --threads 2 >/dev/null 2>recorder.err &
    recorder=$!
    write_files
    kill -0 $recorder 2>/dev/null || fail "the recorder ended by itself: $(<recorder.err)"
    kill -KILL $recorder
    wait $recorder 2>/dev/null || true
    wait $fio || fail "fio: $(head -c 1000 fio.err fio.json)"
    within 60 umount fs
    mark unmounted
    del
    id=$id_a
    del
    within 60 umount disk
    status=$(dm status recorded)
    [[ $status != *logging_disabled* ]] || fail "the log is not complete: $status"
    log_sectors=$(awk '{ print $5 }' <<<"$status")
    dm remove recorded
    # A line that was cut off was not acted on.
    [[ -z $(tail -c 1 recording/recorder) ]] || sed -i '$ d' recording/recorder
    while read -r name first blocks; do
        echo "$(dd if=pool bs=4k skip="$first" count="$blocks" status=none | sha256sum |
            cut -d ' ' -f 1)  fs/$name"
    done <recording/files >recording/sums
    say "$files files, $(wc -l <recording/recorder) lines of the recorder," \
        "$(jq '[.jobs[].write.total_ios] | add' fio.json) writes and" \
        "$(jq '[.jobs[].sync.total_ios] | add' fio.json) fsyncs of fio, $((log_sectors / 2048)) MiB"
}

# --- one entry ----------------------------------------------------------------------------------

# Reads into created, formatted, files and lines what the marks up to an entry say.
marks_until() {
    read -r formatted files lines < <(awk -F '[ ,]' -v until="$1" '
        $1 > until { exit }
        $2 == "MARK" && $5 == "formatted" { formatted = 1 }
        $2 == "MARK" && $5 == "durable" { files = $6; lines = $7 }
        END { print formatted + 0, files + 0, lines + 0 }' entries)
}

leaked=0 total_leaks=0 with_fs=0 files_seen=0 writes_seen=0 next=0
check_entry() {
    entry=$1
    local image formatted files lines
    within 60 replay --log "$log" --to $state --from "$next" --until "$entry" >replayed ||
        fail "replay"
    next=$((entry + 1))
    marks_until "$entry"
    # What follows writes too, and shall not be in the states after this one.
    create_dm cut "0 $sectors snapshot $state $data N 8"
    within 60 mount "$mapped" disk || fail "XFS does not mount"
    leaked=0
    for image in disk/a.qcow2 disk/b.qcow2; do
        sound "$image"
        leaked=$((leaked + leaks))
    done
    total_leaks=$((total_leaks + leaked))
    add disk/a.qcow2
    if ((formatted)); then
        within 60 mount "$dev" fs || fail "ext4 does not mount"
        head -n "$files" recording/sums >expected
        ((files == 0)) || within 60 sha256sum --quiet -c expected ||
            fail "a file of the first $files is not whole"
        within 60 umount fs
        within 60 e2fsck -fn "$dev" >fsck 2>&1 || fail "e2fsck: $(<fsck)"
        with_fs=$((with_fs + 1)) files_seen=$((files_seen + files))
    fi
    del
    # What was durable at the mark, and everything that may have been submitted.
    if [[ -s recording/recorder ]]; then
        awk -v lines="$lines" 'NR <= lines || $1 != "d"' recording/recorder >known
        within 60 qemu-img convert -f qcow2 -O raw disk/b.qcow2 raw || fail "qemu-img convert"
        truncate -s 16M raw # What follows is fio's.
        recorder verify --image-raw raw --log known >verdict || fail "the recorder: $(<verdict)"
        writes_seen=$((writes_seen + $(jq .durable_writes verdict)))
        rm raw
    fi
    ((POINTS <= 10)) || sound disk/a.qcow2
    within 60 umount disk
    dm remove cut
    entry=''
}

# --- all of it ----------------------------------------------------------------------------------

modprobe dm_snapshot
for path in $data $log $state; do
    (($(blockdev --getsize64 "$path") >= MIB << 20)) || fail "$path is too small"
done
empty $state
if [[ -n ${RECORDING:-} ]]; then
    log=$RECORDING/log
    mkdir disk fs
    cp -r "$RECORDING" recording
    rm recording/log
else
    mkdir recording
    record
fi
within 60 replay --log "$log" --list >entries
# From the creation of the images on; the last ones too, when all is unmounted.
awk '$5 == "created" { on = 1 } on && $2 ~ /FLUSH|FUA/ { print $1 }' entries >cuts
cuts=$(wc -l <cuts)
((cuts >= POINTS)) || fail "only $cuts entries with FLUSH or FUA, WORK=$WORK is too short"
if [[ -n ${ENTRIES:-} ]]; then
    tr ' ' '\n' <<<"$ENTRIES" | sort -n >chosen
else
    while read -r number; do
        echo "$((RANDOM << 15 | RANDOM)) $number"
    done <cuts | sort -n >shuffled
    head -n "$POINTS" shuffled | cut -d ' ' -f 2 | sort -n >chosen
fi
say "$(wc -l <entries) entries in the log, $cuts with FLUSH or FUA"
while read -r number; do
    check_entry "$number"
    [[ -z ${VERBOSE:-} ]] || say "entry $number is right, $leaked leaks"
done <chosen
((writes_seen > 0 && files_seen > 0)) || [[ -n ${ENTRIES:-} ]] || fail "nothing was durable"
say "SEED=$SEED: $(wc -l <chosen) power cuts of $cuts, $with_fs with ext4: $files_seen times a" \
    "file whole, $writes_seen times a write there, $total_leaks leaked clusters in all"
no_devices
