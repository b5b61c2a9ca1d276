#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 240
# memory: 8G
# The package's unit under systemd, which is process 1 of namespaces of its own here: started when
# the device is usable, stopped when the image is closed, and ended neither under a mounted file
# system nor to be started again after a death.
source "$(dirname "$0")/lib.sh"

units=/run/test-units conf=/run/ublk-qcow2.conf.d
unit=ublk-qcow2@vm.service errors=/run/ublk-qcow2.errors

write_units() {
    mkdir -p "$units" "$conf" mnt
    # This machine's folders are read-only, and the program is not installed.
    sed "s,/usr/bin/ublk-qcow2,$(command -v ublk-qcow2),; s,/etc/ublk-qcow2,$conf," \
        "$fixtures/../src/dist/ublk-qcow2@.service" >"$units/ublk-qcow2@.service"
    grep -q "^ExecStart=$(command -v ublk-qcow2) add" "$units/ublk-qcow2@.service" ||
        fail "the unit is not as expected"
    mkdir "$units/ublk-qcow2@.service.d"
    printf '[Service]\nTimeoutStopSec=4\nStandardError=append:%s\n' "$errors" \
        >"$units/ublk-qcow2@.service.d/test.conf"
    # Of systemd's own units only what is needed: the others would start this machine's services.
    cp /lib/systemd/system/modprobe@.service "$units/"
    for target in test sysinit basic shutdown umount; do
        printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' $target >"$units/$target.target"
    done
}

# --- outside: systemd in its namespaces, and in them the rest of this script --------------------

if [[ ${1:-} != inside ]]; then
    write_units
    SYSTEMD_UNIT_PATH=$units container=test unshare --pid --fork --kill-child --mount-proc \
        /lib/systemd/systemd --system --unit=test.target --log-level=info --log-target=kmsg \
        --default-standard-output=kmsg --default-standard-error=kmsg </dev/null &
    unshare=$!
    until_true 20 pgrep -P "$unshare" >init
    trap - EXIT
    exec nsenter --target "$(<init)" --mount --pid "--wd=$PWD" bash "$0" inside
fi

# --- inside -------------------------------------------------------------------------------------

ctl() { within 60 systemctl --no-pager "$@"; }
# show PROPERTY [UNIT]
show() { ctl show --value -p "$1" "${2:-$unit}"; }
up() { timeout 5 systemctl is-active --quiet test.target 2>/dev/null; }
until_true 60 up
say "systemd is up"

image="$PWD/an image.qcow2"
create "$image" 256M
printf 'IMAGE="%s"\nNUMBER=7\nOPTIONS="--discard keep --lock on"\n' "$image" >"$conf/vm.conf"
dev=/dev/ublkb7 id=7

start() {
    ctl start "$unit" || fail "start: $(ctl status "$unit" || true)"
    [[ -b $dev ]] || fail "the unit has started, and $dev is not there"
    within 20 dd if="$dev" of=/dev/null bs=4k count=1 iflag=direct status=none
    pid=$(show MainPID)
}
alive() { kill -0 "$pid"; }
failed() { [[ $(show ActiveState) == failed ]]; }
ended() { [[ $(show ActiveState) == inactive ]]; }

start
[[ $(show StatusText) == "serving $dev" ]] || fail "status: $(show StatusText)"
[[ $(show ActiveState) == active ]] || fail "state: $(show ActiveState)"
[[ $(<"/proc/$pid/oom_score_adj") == -1000 ]] || fail "oom_score_adj is not what the unit says"
say "active, '$(show StatusText)'"
ctl stop "$unit"
[[ $(show ActiveState) == inactive && $(show Result) == success ]] ||
    fail "after stop: $(show ActiveState), $(show Result)"
missing 7 || fail "the device is there after the stop"
clean "$image"

say 'a stop with a mounted file system'
start
within 60 mkfs.ext4 -q "$dev"
within 30 mount "$dev" mnt
ctl stop "$unit" || true
[[ $(show ActiveState) == failed ]] || fail "after the stop: $(show ActiveState)"
alive || fail "the server was ended under a mounted file system"
within 30 cp /bin/true mnt/
within 30 sync -f mnt
grep -q "$dev is in use (mounted on" "$errors" || fail "nothing says why it goes on"
within 30 umount mnt
del_number 7
clean "$image"
ctl reset-failed "$unit"

say 'del by hand ends the unit'
start
del_number 7
until_true 20 ended
clean "$image"

say 'a dead server'
start
kill -9 "$pid"
until_true 20 failed
[[ $(show NRestarts) == 0 ]] || fail "it was started again"
[[ -e /dev/ublkc7 ]] || fail "the dead server's device was taken away before anybody saw it"
del_number 7
sound "$image"

say 'a start that fails says why'
ctl reset-failed "$unit"
printf 'IMAGE=/nowhere.qcow2\nNUMBER=7\n' >"$conf/vm.conf"
! ctl start "$unit" 2>start.err || fail "it started without an image"
[[ $(show Result) == exit-code ]] || fail "result: $(show Result)"
grep -q "^ublk-qcow2: /nowhere.qcow2: " "$errors" || fail "it said: $(cat "$errors")"
no_devices
