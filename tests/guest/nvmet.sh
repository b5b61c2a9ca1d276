#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 300
# memory: 8G
# The device as a namespace of the kernel's NVMe target, and that over TCP on the loopback: fio
# verifies through it, an fsync on the far side is a FLUSH here, and what it wrote is in the image.
source "$(dirname "$0")/lib.sh"

nqn=nqn.2026-01.test:ublk-qcow2
target=/sys/kernel/config/nvmet
subsystem=$target/subsystems/$nqn
port=$target/ports/1
mounted=''

# What this test made in the kernel, in the order in which one thing holds the other. The runner
# knows nothing of it, and the device could not go.
take_down() {
    disconnect
    [[ ! -e $port/subsystems/$nqn ]] || rm "$port/subsystems/$nqn"
    [[ ! -e $port ]] || rmdir "$port"
    [[ ! -e $subsystem/namespaces/1 ]] || {
        echo 0 >"$subsystem/namespaces/1/enable"
        rmdir "$subsystem/namespaces/1"
    }
    [[ ! -e $subsystem ]] || rmdir "$subsystem"
    [[ -z $mounted ]] || umount /sys/kernel/config
    mounted=''
}
disconnect() {
    local controller
    for controller in /sys/class/nvme/nvme*; do
        [[ ! -e $controller/subsysnqn || $(<"$controller/subsysnqn") != "$nqn" ]] ||
            echo 1 >"$controller/delete_controller"
    done
}
trap 'status=$?; set +e; take_down; (exit $status); on_exit' EXIT

within 60 modprobe -a nvmet_tcp nvme_tcp
mountpoint -q /sys/kernel/config || {
    mount -t configfs configfs /sys/kernel/config
    mounted=yes
}

# export_device DEVICE: as the README shows it.
export_device() {
    mkdir "$subsystem"
    echo 1 >"$subsystem/attr_allow_any_host"
    mkdir "$subsystem/namespaces/1"
    echo "$1" >"$subsystem/namespaces/1/device_path"
    echo 1 >"$subsystem/namespaces/1/enable"
    mkdir "$port"
    echo tcp >"$port/addr_trtype"
    echo ipv4 >"$port/addr_adrfam"
    echo 127.0.0.1 >"$port/addr_traddr"
    echo 4420 >"$port/addr_trsvcid"
    ln -s "$subsystem" "$port/subsystems/"
}

# connect: leaves the path of the far side's device in remote. (The reply of the kernel has to be
# read from the descriptor that it was asked with.)
connect() {
    local answer controller paths
    exec {fabrics}<>/dev/nvme-fabrics
    echo "transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=$nqn,nr_io_queues=2" >&"$fabrics"
    read -r -t 30 answer <&"$fabrics" || fail "the kernel's NVMe host gave no answer"
    exec {fabrics}>&-
    [[ $answer =~ instance=([0-9]+) ]] || fail "the kernel's NVMe host said '$answer'"
    controller=nvme${BASH_REMATCH[1]}
    [[ $(<"/sys/class/nvme/$controller/subsysnqn") == "$nqn" ]] || fail "$controller is another"
    until_true 30 has_disk
    remote=/dev/${paths[0]##*/}
}
has_disk() {
    mapfile -t paths < <(compgen -G "/dev/nvme*n1")
    ((${#paths[@]} == 1)) && [[ -b ${paths[0]} ]]
}

flushes() {
    within 20 ublk-qcow2 list -n "$id" --json | jq '.[0].stats.flushes'
}

create image.qcow2 256M
add image.qcow2
export_device "$dev"
connect
[[ $(blockdev --getsize64 "$remote") == $((256 << 20)) ]] || fail "$remote has another size"
say "$remote is $dev"

# While a target has the device, it does not go.
refused 'in use' 'NVMe target' -- ublk-qcow2 del -n "$id"

for bs in 4k:2m 64k:8m 1m:16m; do
    within 200 fio --name="randwrite-${bs%:*}" --filename="$remote" --ioengine=libaio --direct=1 \
        --thread --rw=randwrite --bs="${bs%:*}" --size="${bs#*:}" --iodepth=32 --randseed=7 \
        --offset=32m --verify=crc32c --verify_fatal=1 --output-format=json --output=fio.out ||
        fail "fio: $(head -c 2000 fio.out)"
    sed -n '/^{/,$p' fio.out | jq -r '.jobs[] | [.jobname, .read.total_ios, .write.total_ios,
        .error] | @tsv' | while read -r job read written errors; do
        say "$job: read $read written $written errors $errors"
        ((errors == 0 && read > 0 && read == written)) || fail "$job did not verify all"
    done
done

say 'an fsync arrives as a FLUSH, and the data is in the image after the end'
within 60 dd if=/dev/urandom of=shadow bs=64k count=64 status=none
before=$(flushes)
within 60 dd if=shadow of="$remote" bs=64k oflag=direct conv=fsync,notrunc status=none
(($(flushes) > before)) || fail "no FLUSH came: $before before, $(flushes) now"
within 60 blkdiscard -o 64m -l 16m "$remote"

say 'disconnect, and connect again: the same content'
disconnect
until_true 20 test ! -e "$remote"
connect
within 60 cmp -n $((4 << 20)) shadow "$remote"
take_down
until_true 20 test ! -e "$remote"

within 60 cmp -n $((4 << 20)) shadow "$dev"
del
clean image.qcow2
within 60 qemu-img convert -q -f qcow2 -O raw image.qcow2 raw
cmp -n $((4 << 20)) shadow raw || fail "the image differs from what was written"
no_devices
