#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 240
# memory: 8G
# The package's udev rules, with udev's own around them: nothing looks at what is on a disk of ours,
# unless it was added with --trust-content; the disks of other servers are left to the usual rules.
source "$(dirname "$0")/lib.sh"

udev=$VM_CACHE/udev
udevadm=$udev/bin/udevadm
rules=/run/udev/rules.d
mkdir -p "$rules"
for name in 50-udev-default 60-block 60-persistent-storage 64-btrfs 99-systemd; do
    file=$udev/lib/udev/rules.d/$name.rules
    [[ -e $file ]] || file=/usr/lib/udev/rules.d/$name.rules
    # The kinds of devices that these look at, with ublk among them: some are to come.
    sed 's/KERNEL\([!=]\)="loop\*|/KERNEL\1="ublkb*|loop*|/' "$file" >"$rules/$name.rules"
done
grep -l 'ublkb' "$rules"/60-block.rules "$rules"/60-persistent-storage.rules >changed ||
    fail "udev's own rules are not as expected: $(cat changed)"
(($(wc -l <changed) == 2)) || fail "udev's own rules have no list of devices: $(cat changed)"
cp "$fixtures/../src/dist/59-ublk-qcow2.rules" "$rules/"

cp "$udevadm" systemd-udevd
within 20 ./systemd-udevd --daemon
until_true 20 test -S /run/udev/control

settle() { within 60 "$udevadm" settle; }
# property NAME PATH: what udev knows.
property() {
    within 20 "$udevadm" info --query=property --property="$1" --value "$2"
}
# known PATH: all of it that matters here, in one line.
known() {
    local name all=''
    for name in UBLK_QCOW2 ID_FS_TYPE SYSTEMD_READY DM_UDEV_DISABLE_OTHER_RULES_FLAG; do
        all+="$name=$(property $name "$1") "
    done
    echo "${all% }"
}
# watched PATH: whether udev looks again when somebody has written to it.
watched() {
    local watch device
    device=b$(stat -c '%Hr:%Lr' "$1")
    for watch in /run/udev/watch/*; do
        [[ $(readlink "$watch") != "$device" && $watch != */"$device" ]] || return 0
    done
    return 1
}
expect() {
    local got
    got=$(known "$2")
    [[ $got == "$1" ]] || fail "$3: udev knows '$got', expected '$1'"
    say "$3: $got"
}
again() {
    within 20 "$udevadm" trigger --action=change "$1"
    settle
}

label=udev-$$
untrusted='UBLK_QCOW2=untrusted ID_FS_TYPE= SYSTEMD_READY=0 DM_UDEV_DISABLE_OTHER_RULES_FLAG=1'
trusted='UBLK_QCOW2=trusted ID_FS_TYPE=ext4 SYSTEMD_READY= DM_UDEV_DISABLE_OTHER_RULES_FLAG='
link=/dev/disk/by-label/$label

create image.qcow2 256M
add image.qcow2
settle
expect "$untrusted" "$dev" 'an empty disk'
within 60 mkfs.ext4 -q -L "$label" "$dev"
again "$dev"
expect "$untrusted" "$dev" 'with a file system'
[[ ! -e $link ]] || fail "$link is there"
! watched "$dev" || fail "udev watches $dev"

# A partition, wherever the kernel found it.
within 20 addpart "$dev" 1 2048 65536
settle
expect "$untrusted" "${dev}p1" 'a partition'
within 20 delpart "$dev" 1
del
settle

add image.qcow2
settle
expect "$untrusted" "$dev" 'added again'
# The same device without a word of its server: that the usual rules would act shows that ours
# kept them from it.
rm "/run/ublk-qcow2/$id.untrusted"
again "$dev"
[[ $(property ID_FS_TYPE "$dev") == ext4 ]] || fail "the usual rules see no file system"
[[ -z $(property UBLK_QCOW2 "$dev") ]] || fail "a disk of another server is taken for ours"
watched "$dev" || fail "udev does not watch the disk of another server"
[[ -L $link ]] || fail "$link is not there"
del
settle

add image.qcow2 --trust-content
settle
expect "$trusted" "$dev" 'with --trust-content'
[[ $(readlink -f "$link") == "$dev" ]] || fail "$link does not lead to $dev"
within 20 ublk-qcow2 list -n "$id" --json | jq -e '.[0].target.trusted' >/dev/null ||
    fail "list does not say that $dev is trusted"
del
settle
[[ -z $(compgen -G '/run/ublk-qcow2/*trusted' || true) ]] || fail "left behind: a word to udev"
no_devices
