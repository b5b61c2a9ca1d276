# shellcheck shell=bash
# Shared by the tests in this folder. Each of them is run as root in the VM, in an empty folder of
# its own below $VM_SCRATCH, passes with status 0, and must leave no device behind.
set -euo pipefail
shopt -s inherit_errexit
export LC_ALL=C

fixtures=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../fixtures" && pwd)
: "${VM_OUT:=$PWD}" "$fixtures"

# Says which test it is, and at the end how long it took; on failure also which devices there are.
test_name=$(basename "$0" .sh)
on_exit() {
    local status=$?
    if ((status)); then
        echo "$test_name: FAILED with status $status after $SECONDS s" >&2
        timeout -k 5 15 ublk-qcow2 list >&2 || true
        kernel_log | tail -n 15 >&2 || true
    else
        echo "$test_name: passed after $SECONDS s"
    fi
}
trap on_exit EXIT
trap "exit 143" TERM

# What the kernel has said since this test began. Tests share a guest, and one before this may have
# torn a device away from under its users.
mark="$test_name begins as $$"
echo "$mark" >/dev/kmsg
kernel_log() {
    dmesg | awk -v mark="$mark" 'found; index($0, mark) { found = 1 } END { exit !found }' ||
        fail "the kernel's log is too short to have all of this test"
}

say() { echo "$test_name [$SECONDS s]: $*"; }
fail() {
    echo "$test_name: FAIL: $*" >&2
    exit 1
}

# within SECONDS COMMAND…: its status, but reaching the limit is a failure of the test.
within() {
    local limit=$1 status=0
    shift
    timeout -k 5 "$limit" "$@" || status=$?
    ((status != 124 && status != 137)) || fail "'$*' did not end within $limit s"
    return $status
}

# until_true SECONDS COMMAND…: repeats the command until it succeeds.
until_true() {
    local limit=$1 end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || fail "waited $limit s for: $*"
        sleep 0.1
    done
}

# --- devices ------------------------------------------------------------------------------------

# add IMAGE [OPTION…]: leaves the device's path in dev and its number in id. ADD_OPTIONS is for
# tests by hand, as in ADD_OPTIONS='--stress --buffered'.
add() {
    local output
    # shellcheck disable=SC2086 # these are words
    output=$(within 60 ublk-qcow2 add -f "$@" ${ADD_OPTIONS:-}) || fail "add $* failed"
    [[ $output =~ ^/dev/ublkb([0-9]+)$ ]] || fail "add printed '$output'"
    dev=$output id=${BASH_REMATCH[1]}
    [[ -b $dev ]] || fail "$dev is not there after add"
}

# del: the device added last.
del() { del_number "$id"; }

# del_number NUMBER [OPTION…]
del_number() {
    within 90 ublk-qcow2 del -n "$@" || fail "del -n $* failed"
    gone "$1"
}

# gone NUMBER: the device has gone.
gone() {
    until_true 15 missing "$1"
}
missing() {
    [[ ! -e /dev/ublkb$1 && ! -e /dev/ublkc$1 ]]
}

# no_devices: there is none at all.
no_devices() {
    local left
    left=$(compgen -G '/dev/ublk[bc]*' || true)
    [[ -z $left ]] || fail "left behind: $left"
}

# daemon_of NUMBER: the process number of the server.
daemon_of() {
    local pid
    pid=$(within 20 ublk-qcow2 list -n "$1" | sed -n 's/.*daemon pid \([0-9]*\).*/\1/p')
    [[ $pid =~ ^[0-9]+$ ]] || fail "list -n $1 names no daemon pid"
    echo "$pid"
}

# kill_daemon SIGNAL NUMBER
kill_daemon() {
    local pid
    pid=$(daemon_of "$2")
    kill "-$1" "$pid"
}

# health NUMBER: how the device is, as list has it.
health() {
    within 20 ublk-qcow2 list --json -n "$1" | jq -r '.[0].health'
}

# refused PHRASE… -- COMMAND…: the command fails with status 1, nothing on stdout, and one line
# on stderr with each of the phrases in it.
refused() {
    local phrases=() phrase status=0 error
    while [[ $1 != -- ]]; do
        phrases+=("$1")
        shift
    done
    shift
    within 60 "$@" >refused.out 2>refused.err || status=$?
    error=$(<refused.err)
    [[ $status == 1 ]] || fail "'$*' ended with $status, expected 1: $error"
    [[ ! -s refused.out ]] || fail "'$*' printed: $(<refused.out)"
    [[ -n $error && $error != *$'\n'* ]] || fail "'$*' wrote not one line to stderr: $error"
    for phrase in "${phrases[@]}"; do
        [[ $error == *"$phrase"* ]] || fail "'$*' should mention '$phrase': $error"
    done
}

# --- what lies beneath --------------------------------------------------------------------------

dm() { within 20 dmsetup --noudevsync --noudevrules "$@"; }

# dm_path NAME: the device of that name; nobody makes one below /dev/mapper here.
dm_path() {
    local path
    for path in /sys/block/dm-*/dm/name; do
        [[ $(<"$path") == "$1" ]] || continue
        path=${path%/dm/name}
        echo "/dev/${path##*/}"
        return 0
    done
    fail "$1 is not there"
}

# dm_table NAME: its table is that on stdin from now on. What was under way ends before, and nobody
# waits for a file system that may hang.
dm_table() {
    dm suspend --noflush --nolockfs "$1"
    dm load "$1"
    dm resume "$1"
}

# --- images -------------------------------------------------------------------------------------

# create IMAGE SIZE [OPTIONS]
create() {
    within 60 qemu-img create -q -f qcow2 ${3:+-o "$3"} "$1" "$2"
}

# clean IMAGE: qemu-img check finds neither errors nor leaks.
clean() {
    local output status=0
    output=$(within 120 qemu-img check -f qcow2 "$1" 2>&1) || status=$?
    [[ $status == 0 && $output == *"No errors were found"* ]] ||
        fail "qemu-img check $1 ended with $status: $(head -n 20 <<<"$output")"
}

# sound IMAGE: leaks at most; their number is left in leaks.
# shellcheck disable=SC2034
sound() {
    local output status=0
    # Each leaked cluster is a line on stderr.
    output=$(within 120 qemu-img check -f qcow2 --output=json "$1" 2>check.err) || status=$?
    if [[ $status != 0 && $status != 3 ]]; then
        cp "$1" "$VM_OUT/" || true
        fail "qemu-img check $1 ended with $status (the image is in $VM_OUT):
$(head -c 3000 check.err) $output"
    fi
    leaks=$(jq '.leaks // 0' <<<"$output")
}

# unlocked IMAGE: nobody else writes to it.
unlocked() {
    within 20 qemu-img info -f qcow2 "$1" >/dev/null 2>&1
}

sum() {
    sha256sum "$1" | cut -d ' ' -f 1
}
