#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 240
# memory: 8G
# File systems: mkfs, mount, copy of a real tree, unmount, del, add: checksums are equal, and both
# checks find nothing.
# By hand: FILES=2000 MIB=100.
source "$(dirname "$0")/lib.sh"

FILES=${FILES:-250} MIB=${MIB:-12}

# A real tree: the first FILES files that are found on the host, as long as they fit in MIB. The
# search ends with them, since the guest reads the host's folders slowly.
mkdir tree
{ find /usr/share /usr/lib -xdev -type f -size -400k -printf '%s %p\n' 2>find.err || true; } |
    awk -v files="$FILES" -v bytes=$((MIB << 20)) \
        '{ sum += $1 } NR > files || sum > bytes { exit } { sub(/^[0-9]+ \//, ""); print }' >list
within 120 tar -C / -cf - -T list | tar -C tree -xf -
count=$(wc -l <list)
((count >= FILES / 2)) || fail "found only $count files"
(cd tree && find . -type f -print0 | sort -z | xargs -0 sha256sum) >sums
say "$count files, $(du -sm tree | cut -f 1) MiB"

case_of() {
    local fs=$1 options=$2 start=$SECONDS
    create image.qcow2 1G "$options"
    add image.qcow2
    within 60 "mkfs.$fs" -q "$dev"
    mkdir -p mnt
    within 30 mount "$dev" mnt
    within 120 cp -r --reflink=never tree/. mnt/
    within 60 umount mnt
    del
    clean image.qcow2

    add image.qcow2
    case $fs in
        ext4) within 60 e2fsck -fn "$dev" >fsck 2>&1 || fail "e2fsck: $(cat fsck)" ;;
        xfs) within 60 xfs_repair -n "$dev" >fsck 2>&1 || fail "xfs_repair: $(cat fsck)" ;;
    esac
    within 30 mount -o ro "$dev" mnt
    (cd mnt && within 120 sha256sum --quiet -c ../sums) || fail "$fs, $options: checksums differ"
    within 60 umount mnt
    del
    clean image.qcow2
    rm image.qcow2
    say "$fs on ${options:-the default format}: right, $((SECONDS - start)) s"
}

case_of ext4 ''
case_of xfs compat=v2
case_of xfs cluster_size=4k
[[ -z ${ALL:-} ]] || for options in compat=v2 cluster_size=512 cluster_size=2M \
    preallocation=metadata preallocation=full lazy_refcounts=on; do
    case_of ext4 "$options"
    case_of xfs "$options"
done
no_devices
