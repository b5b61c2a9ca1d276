#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 180
# memory: 4G
# A device of a user who is not root: udev gives its nodes to the user by the package's rules, the
# user serves, lists and deletes it, other users cannot, and root can.
source "$(dirname "$0")/lib.sh"

udev=$VM_CACHE/udev
udevadm=$udev/bin/udevadm
mkdir -p /run/udev/rules.d
# What udev's own rules say of nodes without a rule of their own.
sed "s,/usr/bin/ublk-qcow2,$(command -v ublk-qcow2)," "$fixtures/../src/dist/59-ublk-qcow2.rules" \
    >/run/udev/rules.d/59-ublk-qcow2.rules
grep -q "$(command -v ublk-qcow2) owner" /run/udev/rules.d/59-ublk-qcow2.rules ||
    fail "the rules do not ask whose a device is"
cp "$udevadm" systemd-udevd
within 20 ./systemd-udevd --daemon
until_true 20 test -S /run/udev/control

# as USER COMMAND…: with nothing that root has.
as() {
    local user=$1
    shift
    within 60 setpriv --reuid "$user" --regid "$user" --clear-groups --inh-caps=-all \
        --no-new-privs env XDG_RUNTIME_DIR="$PWD/$user" "$@"
}
chmod 755 . "$VM_SCRATCH"
for user in 1000 1001; do
    mkdir -m 700 "$user"
    chown "$user:$user" "$user"
done
image=$PWD/1000/image.qcow2
as 1000 qemu-img create -q -f qcow2 "$image" 64M

# --- before the user is let at the control device ---
chmod 600 /dev/ublk-control
! as 1000 ublk-qcow2 add -f "$image" --unprivileged 2>err || fail "added without any permission"
grep -q 'not permitted.*ublk-control' err || fail "without permission: $(<err)"
chmod 666 /dev/ublk-control
! as 1000 ublk-qcow2 add -f "$image" 2>err || fail "added a device of root's"
[[ $(wc -l <err) == 1 ]] || fail "more than a line: $(<err)"
grep -q -e '--unprivileged' err || fail "without --unprivileged: $(<err)"
! as 1000 ublk-qcow2 add -f "$image" --unprivileged --data-path zero-copy 2>err ||
    fail "an unprivileged device with zero copy"
grep -q 'leave --data-path out' err || fail "with a data path: $(<err)"

# --- served by a user ---
# What is left of an earlier device of root's says nothing of a user's.
mkdir -p /run/ublk-qcow2
for number in 0 1 2 3; do
    : >"/run/ublk-qcow2/$number.trusted"
done
dev=$(as 1000 ublk-qcow2 add -f "$image" --unprivileged) || fail "add --unprivileged failed"
[[ $dev =~ ^/dev/ublkb([0-9]+)$ ]] || fail "add printed '$dev'"
id=${BASH_REMATCH[1]}
within 60 "$udevadm" settle
for node in "$dev" "/dev/ublkc$id"; do
    [[ $(stat -c '%u %g %a' "$node") == '1000 1000 600' ]] || fail "$node: $(stat "$node")"
done
[[ $("$udevadm" info --query=property --property=UBLK_QCOW2 --value "$dev") == untrusted ]] ||
    fail "udev trusts what a user's disk holds"
rm /run/ublk-qcow2/[0-3].trusted
head -c 8M /dev/urandom >1000/data
chown 1000 1000/data
as 1000 dd if="$PWD/1000/data" of="$dev" bs=64k oflag=direct conv=fsync status=none
as 1000 dd if="$dev" of="$PWD/1000/got" bs=64k count=128 iflag=direct status=none
cmp 1000/got 1000/data || fail "what the user wrote is not there"
as 1000 ublk-qcow2 list --json -n "$id" >listed
jq -e '.[0] | .health == "good" and .target.data_path == "copy" and .owner_uid == 1000' listed \
    >/dev/null || fail "list of the user: $(<listed)"
as 1000 ublk-qcow2 stats -n "$id" --json | jq -e '.requests.write.bytes >= 8388608' >/dev/null ||
    fail "stats of the user"

# --- others ---
! as 1001 dd if="$dev" of=/dev/null bs=4k count=1 status=none 2>err || fail "another user reads it"
! as 1001 ublk-qcow2 del -n "$id" --force 2>err || fail "another user ended it"
[[ -z $(as 1001 ublk-qcow2 list 2>err) ]] || fail "another user sees it"
[[ ! -s err ]] || fail "list of another user: $(<err)"
# One of root's, beside it, is not the user's.
own=$id own_dev=$dev
create root.qcow2 1M
add root.qcow2
! as 1000 ublk-qcow2 del -n "$id" --force 2>err || fail "a user ended a device of root's"
! as 1000 dd if="$dev" of=/dev/null bs=4k count=1 status=none 2>err || fail "a user reads root's"
within 20 ublk-qcow2 list | grep -q "^dev id $own:" || fail "root does not see it: $(ublk-qcow2 list)"
del
clean root.qcow2

# --- its end ---
id=$own dev=$own_dev
as 1000 ublk-qcow2 del -n "$id" || fail "del of the user failed"
gone "$id"
as 1000 qemu-img check -q "$image" || fail "qemu-img check: $(as 1000 qemu-img check "$image")"
dev=$(as 1000 ublk-qcow2 add -f "$image" --unprivileged) || fail "add --unprivileged failed"
id=${dev#/dev/ublkb}
within 60 ublk-qcow2 del -n "$id" || fail "root could not end it"
gone "$id"
as 1000 qemu-img check -q "$image" || fail "qemu-img check: $(as 1000 qemu-img check "$image")"
[[ -z $(ls 1000/ublk-qcow2) ]] || fail "left: $(ls 1000/ublk-qcow2)"
no_devices
