#!/usr/bin/env bash
# kernels: new
# disk: no
# timeout: 400
# memory: 8G
# A Debian base system in compressed images, zlib and zstd, as cloud images come: every file is the
# same through our device and through qemu-nbd; then some are written, and the image stays sound.
source "$(dirname "$0")/lib.sh"

images=$VM_CACHE/cloud
[[ -e $images/zlib.qcow2 ]] || fail "no images in $images; tests/setup cloud-images makes them"
mkdir mnt

# sums DEVICE FILE: the sums of all files on it, and what the links say.
sums() {
    within 60 mount -t ext4 -o ro,noload "$1" mnt
    (cd mnt && find . -type f -print0 | sort -z | within 200 xargs -0 sha256sum) >"$2"
    (cd mnt && find . -type l -printf '%p -> %l\n' | sort) >>"$2"
    within 60 umount mnt
}

modprobe nbd
# qemu-nbd keeps a socket there.
mkdir -p /run/lock
for type in zlib zstd; do
    within 60 cp "$images/$type.qcow2" .
    within 30 qemu-nbd -r -f qcow2 -c /dev/nbd0 "$type.qcow2"
    until_true 10 test -s /sys/block/nbd0/pid
    [[ -s expected ]] || sums /dev/nbd0 expected
    within 30 qemu-nbd -d /dev/nbd0 >disconnected
    (($(wc -l <expected) > 1000)) || fail "only $(wc -l <expected) files on the image"

    add "$type.qcow2" --read-only
    sums "$dev" found
    cmp expected found || fail "$type: $(diff expected found | head -n 5)"
    del

    # What was compressed is written: its clusters become normal ones.
    add "$type.qcow2"
    within 60 mount "$dev" mnt
    within 60 cp -r mnt/usr/bin mnt/copied
    within 60 rm -rf mnt/usr/sbin
    within 60 cp -r mnt/copied mnt/usr/sbin
    within 60 umount mnt
    within 60 e2fsck -fn "$dev" >fsck 2>&1 || fail "e2fsck: $(<fsck)"
    within 60 mount -o ro "$dev" mnt
    diff -r --no-dereference mnt/usr/bin mnt/usr/sbin || fail "$type: what was copied differs"
    within 60 umount mnt
    del
    clean "$type.qcow2"
    say "$type: $(wc -l <expected) files are the same as through qemu-nbd"
    rm "$type.qcow2"
done
no_devices
