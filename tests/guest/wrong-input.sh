#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 300
# memory: 8G
# Wrong input: one clear line, status 1, no device, the image unchanged. What cannot be read ends
# with EIO. tests/fixtures.rs goes through all of fixtures/corrupt natively; here that is ALL=1.
source "$(dirname "$0")/lib.sh"

# marked FILE COPY: the same but for the corrupt bit, which is set (byte 80, counted from one).
marked() {
    local differences
    differences=$(cmp -l "$1" "$2" 2>&1) || true
    [[ $differences =~ ^\ *80\ +0\ +2$ ]] ||
        fail "$2 differs in more or less than its mark: '$(head -n 5 <<<"$differences")'"
}

# fails_writing FILE SECTOR: the device, of FILE, answers EIO to a write there, and to a read at
# sector 64 it does not; del says why.
fails_writing() {
    if within 20 dd if=/dev/zero of="$dev" bs=512 count=1 seek="$2" oflag=direct 2>dd.err; then
        fail "$1: a write at sector $2 succeeded"
    fi
    grep -q 'Input/output error' dd.err || fail "$1: $(cat dd.err)"
    # What it did not harm can still be read.
    within 20 dd if="$dev" of=/dev/null bs=512 count=1 skip=64 iflag=direct status=none ||
        fail "$1: reads elsewhere fail"
    # The device goes, and del says why that is not all.
    refused metadata -- ublk-qcow2 del -n "$id"
    gone "$id"
}

say 'files that are no images'
refused missing.qcow2 'no such file' -- ublk-qcow2 add -f missing.qcow2
mkdir folder
refused folder directory -- ublk-qcow2 add -f folder
mkfifo pipe
refused pipe 'a pipe' -- ublk-qcow2 add -f pipe
refused null 'character device' -- ublk-qcow2 add -f /dev/null

say 'users without permission'
chmod 755 .
create image.qcow2 64M
before=$(sum image.qcow2)
nobody=(setpriv --reuid 65534 --regid 65534 --clear-groups ublk-qcow2)
chmod 600 image.qcow2
refused image.qcow2 'permission denied' -- "${nobody[@]}" add -f image.qcow2
chmod 644 image.qcow2
refused image.qcow2 writing --read-only -- "${nobody[@]}" add -f image.qcow2
chmod 666 image.qcow2
refused root -- "${nobody[@]}" add -f image.qcow2
refused root -- "${nobody[@]}" add -f image.qcow2 --read-only
refused root -- "${nobody[@]}" list
no_devices

say 'a number that is taken'
create other.qcow2 64M
add other.qcow2 -n 5
[[ $dev == /dev/ublkb5 ]] || fail "add -n 5 gave $dev"
refused image.qcow2 5 taken -- ublk-qcow2 add -f image.qcow2 -n 5
del
no_devices
refused 5 -- ublk-qcow2 del -n 5
refused 5 -- ublk-qcow2 list -n 5

say 'no ublk driver'
modprobe -r ublk_drv
refused image.qcow2 /dev/ublk-control 'modprobe ublk_drv' Linux -- ublk-qcow2 add -f image.qcow2
refused /dev/ublk-control 'modprobe ublk_drv' -- ublk-qcow2 list
modprobe ublk_drv
until_true 10 test -e /dev/ublk-control
[[ $(sum image.qcow2) == "$before" ]] || fail "image.qcow2 was changed"

say 'malformed and unsupported images'
mkdir images
number=0
while IFS=$'\t' read -r file verdict field phrase; do
    [[ $file != '#'* ]] || continue
    [[ $verdict != refuse || -n ${ALL:-} ]] || ((number++ % 10 == 0)) || continue
    cp "$fixtures/corrupt/$file" images/
    case $verdict in
        refuse)
            refused "$file" "$field" "$phrase" -- ublk-qcow2 add -f "images/$file"
            cmp "$fixtures/corrupt/$file" "images/$file" || fail "$file was changed"
            no_devices
            ;;
        read)
            add "images/$file"
            if within 20 dd if="$dev" of=/dev/null bs=512 count=1 iflag=direct 2>dd.err; then
                fail "$file: a read at byte 0 succeeded"
            fi
            grep -q 'Input/output error' dd.err || fail "$file: $(cat dd.err)"
            del
            cmp "$fixtures/corrupt/$file" "images/$file" || fail "$file was changed"
            ;;
        mend)
            info=$(ublk-qcow2 info -f "images/$file")
            [[ $info == *"feature: dirty"* ]] ||
                ! within 20 ublk-qcow2 check -f "images/$file" >/dev/null ||
                fail "$file needs no mending: $info"
            add "images/$file"
            del
            clean "images/$file"
            info=$(ublk-qcow2 info -f "images/$file")
            [[ $info != *"feature: dirty"* ]] || fail "$file is still marked dirty: $info"
            ;;
        write)
            add "images/$file"
            fails_writing "$file" 0
            marked "$fixtures/corrupt/$file" "images/$file"
            ;;
        *) fail "unknown verdict '$verdict'" ;;
    esac
    say "$file: $verdict, right"
done <"$fixtures/corrupt/expected.tsv"

say 'an image that is damaged while it is served'
create damaged.qcow2 256M
within 60 qemu-io -f qcow2 -c 'write -q 0 64k' -c 'write -q 128M 64k' damaged.qcow2
# word PLACE: the number there, without the flag COPIED.
word() { echo $(($(od -An -t d8 --endian=big -j "$1" -N 8 damaged.qcow2) & ~(1 << 63))); }
l1=$(word 40)
entry=$(($(word "$l1") + 2048 * 8))
add damaged.qcow2
# The cluster at 128 MiB is the L1 table from now on; nobody has read its entry yet.
printf '%b' "$(printf '%016x' $((l1 | 1 << 63)) | sed 's/../\\x&/g')" |
    dd of=damaged.qcow2 bs=1 seek=$entry conv=notrunc,fsync status=none
cp damaged.qcow2 before.qcow2
fails_writing damaged.qcow2 $((128 << 11))
marked before.qcow2 damaged.qcow2
info=$(within 20 qemu-img info -f qcow2 damaged.qcow2)
[[ $info == *"corrupt: true"* ]] || fail "qemu-img does not see the mark: $info"
refused corrupt -- ublk-qcow2 add -f damaged.qcow2
no_devices

say 'images that are served'
while IFS=$'\t' read -r file size content; do
    [[ $file != '#'* ]] || continue
    cp "$fixtures/images/$file" images/
    for mode in '' --read-only; do
        # shellcheck disable=SC2086 # no option is no word
        add "images/$file" $mode
        [[ $(blockdev --getsize64 "$dev") == "$size" ]] || fail "$file: wrong size"
        found=$(within 20 dd if="$dev" bs=64k iflag=direct status=none | sha256sum)
        [[ $found == "$content "* ]] || fail "$file: wrong content"
        del
        # Bitmaps are marked as in use before anything can be written.
        [[ $file == bitmap.qcow2 && -z $mode ]] && cp "$fixtures/images/$file" images/ && continue
        cmp "$fixtures/images/$file" "images/$file" || fail "$file was changed by reading"
    done
done <"$fixtures/images/expected.tsv"
no_devices

say 'a damaged compressed cluster is named in the log'
cp "$fixtures/corrupt/compressed-damaged.qcow2" images/compressed.qcow2
RUST_LOG=info ublk-qcow2 add --foreground -n 0 -f images/compressed.qcow2 >out 2>log &
server=$!
until_true 30 grep -q ublkb0 out
if within 20 dd if=/dev/ublkb0 of=/dev/null bs=512 count=1 iflag=direct 2>dd.err; then
    fail "a read of a damaged compressed cluster succeeded"
fi
within 60 ublk-qcow2 del -n 0
wait $server || fail "the server ended with status $?: $(cat log)"
grep 'compressed cluster at byte' log >/dev/null || fail "not in the log: $(cat log)"
no_devices
