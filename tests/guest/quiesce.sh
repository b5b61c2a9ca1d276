#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 240
# memory: 4G
# Devices without a server: handed over with requests under way; what requests see meanwhile with
# each mode of --recovery; and what recover and quiesce refuse.
source "$(dirname "$0")/lib.sh"

serverless() { until_true 15 eval "ublk-qcow2 list -n $id | grep -qE 'state (QUIESCED|FAIL_IO)'"; }
kill_server() {
    kill -KILL "$(daemon_of "$id")"
    serverless
}
recover() {
    local out
    out=$(within 60 ublk-qcow2 recover -n "$id") || fail "recover -n $id failed"
    [[ $out == "$dev" ]] || fail "recover printed '$out'"
}
head -c 1M /dev/urandom >data

# --- what is refused ---
refused 'no ublk device 77' list -- ublk-qcow2 recover -n 77
create image.qcow2 64M
if [[ $VM_KERNEL == old ]]; then
    add image.qcow2 --recovery queue
    refused 'Linux 6.16' recover -- ublk-qcow2 quiesce -n "$id"
    ! within 60 ublk-qcow2 add -f image.qcow2 --recovery fail 2>err || fail "mode fail was taken"
    del
    add image.qcow2
    del
else
    refused 'no ublk device 77' list -- ublk-qcow2 quiesce -n 77
    add image.qcow2
    refused 'without --recovery' 'del -n' -- ublk-qcow2 quiesce -n "$id"
    del
    refused 'leave --delivery out' -- ublk-qcow2 add -f image.qcow2 --recovery queue --delivery batch
fi

# --- what requests see while there is no server ---
modes=(queue reissue)
[[ $VM_KERNEL == old ]] || modes+=(fail)
for mode in "${modes[@]}"; do
    add image.qcow2 --recovery "$mode"
    within 30 dd if=data of="$dev" bs=64k oflag=direct conv=notrunc status=none
    kill_server
    [[ $VM_KERNEL == old ]] || refused "recover -n $id" -- ublk-qcow2 quiesce -n "$id"
    dd if="$dev" of=got bs=64k count=16 iflag=direct status=none 2>dd.err &
    reader=$!
    sleep 1
    if [[ $mode == fail ]]; then
        ! wait $reader || fail "mode fail: a read without a server ended well"
        recover
    else
        kill -0 $reader || fail "mode $mode: a read without a server ended: $(<dd.err)"
        recover
        wait $reader || fail "mode $mode: the read that had waited failed: $(<dd.err)"
        cmp got data || fail "mode $mode: what was acknowledged is not there"
    fi
    within 30 dd if="$dev" of=got bs=64k count=16 iflag=direct status=none
    cmp got data || fail "mode $mode: what was acknowledged is not there"
    del
    sound image.qcow2
    say "mode $mode"
done

# --- another image in its place ---
# another_image PHRASE: recover refuses a copy of the image, and takes the image itself.
another_image() {
    cp image.qcow2 other.qcow2
    mv image.qcow2 kept.qcow2
    mv other.qcow2 image.qcow2
    ! within 60 ublk-qcow2 recover -n "$id" 2>err || fail "another image was served in its place"
    grep -q "$1" err || fail "another image: $(<err)"
    mv kept.qcow2 image.qcow2
    recover
}
add image.qcow2 --recovery queue
kill_server
another_image 'belongs to another image'
if [[ $VM_KERNEL == new ]]; then
    within 60 ublk-qcow2 quiesce -n "$id" || fail "quiesce failed"
    another_image 'another file has its name'
fi
del
sound image.qcow2
[[ $VM_KERNEL == new ]] || { no_devices; exit; }

# --- handed over with requests under way ---
dm create beneath --table "0 $((400 * 2048)) linear /dev/ram1 0"
trap 'status=$?; set +e; timeout 20 dmsetup --noudevsync resume beneath 2>/dev/null
    (exit $status); on_exit' EXIT
within 60 mkfs.xfs -q -f "$(dm_path beneath)"
mkdir disk
within 30 mount "$(dm_path beneath)" disk
create disk/image.qcow2 64M
for path in zero-copy user-copy; do
    add disk/image.qcow2 --recovery reissue --data-path "$path"
    pid=$(daemon_of "$id")
    dm suspend --noflush --nolockfs beneath
    dd if=data of="$dev" bs=1M oflag=direct conv=notrunc status=none 2>dd.err &
    writer=$!
    sleep 1
    within 60 ublk-qcow2 quiesce -n "$id" 2>err &
    quiesce=$!
    sleep 1
    kill -0 "$pid" || fail "$path: the server has ended before its requests"
    dm resume beneath
    wait $quiesce || fail "$path: quiesce with a write under way: $(<err)"
    [[ ! -e /proc/$pid ]] || fail "$path: the server has not ended"
    wait $writer || fail "$path: the write under way failed: $(<dd.err)"
    recover
    within 30 dd if="$dev" of=got bs=1M count=1 iflag=direct status=none
    cmp got data || fail "$path: what was written is not there"

    del

    # All tags are busy: there is nothing for the driver to abort.
    add disk/image.qcow2 --recovery reissue --data-path "$path" --depth 2
    pid=$(daemon_of "$id")
    dm suspend --noflush --nolockfs beneath
    fio --name=v --filename="$dev" --rw=randwrite --bs=4k --size=1M --ioengine=libaio \
        --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --output=fio.out \
        >fio.err 2>&1 &
    writer=$!
    until_true 10 eval "[[ \$(ublk-qcow2 stats -n $id --json |
        jq '.queues[0].requests_under_way') == 2 ]]"
    within 60 ublk-qcow2 quiesce -n "$id" 2>err &
    quiesce=$!
    sleep 1
    dm resume beneath
    wait $quiesce || fail "$path: quiesce with all tags busy: $(<err)"
    [[ ! -e /proc/$pid ]] || fail "$path: the server has not ended"
    recover
    wait $writer || fail "$path: fio with all tags busy: $(head -c 1500 fio.err)"
    del

    # Again and again, under writes at the device's whole depth that fio verifies.
    add disk/image.qcow2 --recovery reissue --data-path "$path" --depth 32
    fio --name=v --filename="$dev" --rw=randwrite --bs=4k --size=16M --io_size=1G \
        --time_based --runtime=14 --ioengine=libaio --iodepth=32 --direct=1 --verify=crc32c \
        --verify_fatal=1 --verify_backlog=1024 --output=fio.out >fio.err 2>&1 &
    fio=$!
    turns=0
    while kill -0 $fio 2>/dev/null && ((turns < 10)); do
        sleep "0.$((RANDOM % 8 + 1))"
        within 60 ublk-qcow2 quiesce -n "$id" || fail "$path: quiesce $turns failed"
        recover
        turns=$((turns + 1))
    done
    wait $fio || fail "$path: fio: $(head -c 1500 fio.err) $(tail -c 1500 fio.out)"
    ((turns >= 5)) || fail "$path: only $turns turns"
    del
    sound disk/image.qcow2
    say "$path: $turns times handed over under load"
done
kernel_log >kernel.log
! grep -E 'I/O error.*ublk' kernel.log || fail "an error was seen above the device"

# Nobody waits any more for what a server hears late.
add disk/image.qcow2 --recovery reissue
pid=$(daemon_of "$id")
kill -STOP "$pid"
! timeout 2 ublk-qcow2 quiesce -n "$id" 2>err || fail "a server that is stopped was handed over"
kill -CONT "$pid"
sleep 1
[[ $(daemon_of "$id") == "$pid" && $(health "$id") == good ]] ||
    fail "handed over for somebody who has left: $(ublk-qcow2 list -n "$id")"

# What takes no more writes still serves reads, which no successor would.
within 60 dd if=data of="$dev" bs=1M seek=40 oflag=direct conv=notrunc status=none
dm suspend --noflush --nolockfs beneath
dm load beneath --table "0 $((400 * 2048)) error"
dm resume beneath
! within 60 sync "$dev" 2>sync.err || fail "synced on a disk that fails"
refused 'takes no writes any more' -- ublk-qcow2 quiesce -n "$id"
within 60 ublk-qcow2 del -n "$id" --force 2>err || true
until_true 10 eval "[[ ! -e $dev && ! -e /proc/$pid ]]"
within 60 umount disk
dm remove beneath
no_devices
