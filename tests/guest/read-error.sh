#!/usr/bin/env bash
# kernels: new
# disk: no
# timeout: 120
# memory: 8G
# A bad sector in what lies beneath: a copy-on-write that cannot read it fails, and leaves the guest
# what it had; nothing else is hurt, and when the sector can be read again, all of it is there.
source "$(dirname "$0")/lib.sh"

MIB=400 # The least of XFS is 300.
sectors=$((MIB * 2048))
data=/dev/ram1

# The table from now on, from stdin.
table() {
    dm_table beneath
    echo 3 >/proc/sys/vm/drop_caches
}

dm create beneath --table "0 $sectors linear $data 0"
mapped=$(dm_path beneath)
within 60 mkfs.xfs -q -f "$mapped"
mkdir disk
within 30 mount "$mapped" disk
head -c 32M /dev/urandom >disk/base.raw
create disk/top.qcow2 32M backing_file=base.raw,backing_fmt=raw
within 60 sync -f disk
# Where byte 8 MiB of the base lies, in sectors.
first=$(xfs_bmap disk/base.raw |
    sed -n 's/.*\[\([0-9]*\)\.\.\([0-9]*\)\]: \([0-9]*\)\.\..*/\1 \2 \3/p' |
    awk '$1 <= 16384 && 16384 <= $2 { print $3 + 16384 - $1; exit }')
[[ $first =~ ^[0-9]+$ ]] || fail "cannot find the base's blocks: $(xfs_bmap disk/base.raw)"
cp disk/base.raw model

# write OFFSET: 4 KiB, in the guest and in the model.
write() {
    head -c 4096 /dev/urandom >block
    within 30 dd if=block of="$dev" bs=4096 seek=$(($1 / 4096)) oflag=direct status=none \
        conv=notrunc,fsync 2>write.err || return 1
    dd if=block of=model bs=4096 seek=$(($1 / 4096)) conv=notrunc status=none
}

table <<END
0 $first linear $data 0
$first 128 error
$((first + 128)) $((sectors - first - 128)) linear $data $((first + 128))
END
add disk/top.qcow2
! write $(((8 << 20) + 4096)) || fail "a write whose copy-on-write cannot read has succeeded"
[[ $(<write.err) == *'Input/output error'* ]] || fail "not EIO: $(<write.err)"
write $((9 << 20)) || fail "a write beside the bad sector failed: $(<write.err)"
# All of the cluster is given: nothing beneath has to be read.
head -c 64K /dev/urandom >cluster
within 30 dd if=cluster of="$dev" bs=64K seek=$((10 << 4)) oflag=direct status=none conv=notrunc
dd if=cluster of=model bs=64K seek=$((10 << 4)) conv=notrunc status=none
within 30 dd if="$dev" of=/dev/null bs=4096 skip=$(((8 << 20) / 4096)) count=1 iflag=direct \
    status=none 2>read.err && fail "a bad sector was read"
[[ $(<read.err) == *'Input/output error'* ]] || fail "not EIO: $(<read.err)"

echo "0 $sectors linear $data 0" | table
within 60 cmp "$dev" model || fail "the disk is not what was written"
write $(((8 << 20) + 4096)) || fail "the sector is good again, and a write failed: $(<write.err)"
del
clean disk/top.qcow2
add disk/top.qcow2 --read-only
within 60 cmp "$dev" model || fail "the disk is not what was written"
del
within 60 umount disk
dm remove beneath
no_devices
