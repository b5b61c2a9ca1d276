#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 240
# memory: 8G
# Every kind of image that qemu-img makes: what the device reads is what qemu-img reads; after
# writes, the image is clean and reads as a raw file that got the same writes from dd.
source "$(dirname "$0")/lib.sh"

size=$((4 << 20))

# A file with something of everything, 4 MiB less a few sectors.
{
    head -c 1500000 /dev/urandom
    head -c 1000000 /dev/zero
    { yes 'compresses well' || true; } | head -c $((size - 2500000 - 2560))
} >base.raw
truncate -s $size whole.raw
dd if=base.raw of=whole.raw conv=notrunc status=none

# put FILE FLAGS: writes that begin and end within clusters and subclusters, over old and new ground
put() {
    local at
    for at in 1 37 1030 2929 3500 8186; do
        dd if=patch of="$1" bs=512 seek=$at count=6 conv=notrunc"$2" status=none
    done
    # Whole clusters of zeros over data.
    dd if=/dev/zero of="$1" bs=64k seek=8 count=3 conv=notrunc"$2" status=none
}
head -c 3072 /dev/urandom >patch

# same FILE RAW: the two have the same bytes; those of a device do not come from its page cache
same() {
    [[ ! -b $1 ]] || blockdev --flushbufs "$1"
    within 60 cmp -n $size "$1" "$2" || fail "$name: $1 and $2 differ"
}

# serves NAME IMAGE [OPTION…]: the whole cycle. The model is what qemu-img reads before.
serves() {
    name=$1 image=$2
    shift 2
    say "$name"
    within 60 qemu-img convert -f qcow2 -O raw "$image" model.raw
    truncate -s $size model.raw
    add "$image" "$@"
    same "$dev" model.raw
    put model.raw ''
    put "$dev" ,fsync
    same "$dev" model.raw
    del
    clean "$image"
    within 60 qemu-img convert -f qcow2 -O raw "$image" after.raw
    same after.raw model.raw
}
# made IMAGE [OPTIONS]: an image with the content of whole.raw
made() { within 60 qemu-img convert -f raw -O qcow2 ${2:+-o "$2"} whole.raw "$1"; }

for method in zlib zstd; do
    within 60 qemu-img convert -c -f raw -O qcow2 -o compression_type=$method whole.raw c.qcow2
    serves "compressed, $method" c.qcow2 --stress
done
within 60 qemu-img convert -c -f raw -O qcow2 -o cluster_size=2M whole.raw c2.qcow2
serves 'compressed, clusters of 2 MiB' c2.qcow2

made l2.qcow2 extended_l2=on,cluster_size=64k
serves 'extended L2 entries' l2.qcow2
within 60 qemu-img convert -c -f raw -O qcow2 -o extended_l2=on whole.raw l2c.qcow2
serves 'extended L2 entries above compressed clusters' l2c.qcow2 --discard keep

say 'a chain of three, with a shorter base'
mkdir chain chain/deep
cp base.raw chain/deep/base.raw
create chain/deep/middle.qcow2 3M cluster_size=4k,backing_file=base.raw,backing_fmt=raw
qemu-io -f qcow2 -c 'write -P 0x33 700k 9k' chain/deep/middle.qcow2 >/dev/null
create chain/upper.qcow2 $size cluster_size=2M,backing_file=deep/middle.qcow2,backing_fmt=qcow2
qemu-io -f qcow2 -c 'write -P 0x44 1k 1k' chain/upper.qcow2 >/dev/null
create top.qcow2 $size \
    extended_l2=on,cluster_size=32k,backing_file="$PWD/chain/upper.qcow2",backing_fmt=qcow2
sums=$(sha256sum chain/*.qcow2 chain/deep/*)
serves 'a chain' top.qcow2
[[ $(sha256sum chain/*.qcow2 chain/deep/*) == "$sums" ]] || fail "a file beneath was written to"
mv chain elsewhere
refused 'does not exist' -- ublk-qcow2 add -f top.qcow2
within 20 qemu-img rebase -u -f qcow2 -b "$PWD/elsewhere/upper.qcow2" -F qcow2 top.qcow2
mkdir away
mv top.qcow2 away/
refused "--allow-backing $PWD/elsewhere" -- ublk-qcow2 add -f away/top.qcow2
serves 'a chain elsewhere' away/top.qcow2 --allow-backing "$PWD/elsewhere"

for raw in off on; do
    made d.qcow2 data_file=d.data,data_file_raw=$raw
    refused '"d.data"' '--data-file' -- ublk-qcow2 add -f d.qcow2
    serves "a data file, raw=$raw" d.qcow2 --data-file d.data
    [[ $raw == off ]] || same d.data model.raw
    rm d.qcow2 d.data
done

made s.qcow2
within 20 qemu-img snapshot -c first s.qcow2
serves 'a snapshot beneath the disk' s.qcow2
within 20 qemu-img snapshot -c second s.qcow2
say 'snapshots served by themselves'
for wanted in first 2; do
    add s.qcow2 --read-only --snapshot $wanted
    [[ $wanted == 2 ]] || same "$dev" whole.raw
    [[ $wanted != 2 ]] || same "$dev" model.raw
    del
done
refused third '1 "first"' -- ublk-qcow2 add -f s.qcow2 --read-only --snapshot third
within 20 qemu-img snapshot -a first s.qcow2
clean s.qcow2
within 60 qemu-img convert -f qcow2 -O raw s.qcow2 after.raw
same after.raw whole.raw

say 'a snapshot of another size than the disk'
within 20 qemu-img resize -q -f qcow2 s.qcow2 $((size + (1 << 20)))
add s.qcow2
[[ $(blockdev --getsize64 "$dev") == $((size + (1 << 20))) ]] || fail "the disk has a wrong size"
del
add s.qcow2 --read-only --snapshot first
[[ $(blockdev --getsize64 "$dev") == "$size" ]] || fail "the snapshot has the disk's size"
same "$dev" whole.raw
del
serves 'a snapshot smaller than the disk' s.qcow2
within 20 qemu-img snapshot -a first s.qcow2
clean s.qcow2
within 60 qemu-img convert -f qcow2 -O raw s.qcow2 after.raw
[[ $(stat -c %s after.raw) == "$size" ]] || fail "going back did not bring the old size back"
same after.raw whole.raw

# Puts an extension that nobody knows behind those of an image.
cat >extension.pl <<'END'
open my $file, '+<', $ARGV[0] or die $!;
sysread $file, my $header, 4096;
my $at = unpack 'N', substr $header, 100, 4;
while (my ($kind, $length) = unpack 'NN', substr $header, $at, 8) {
    last if !$kind;
    $at += 8 + ($length + 7 & ~7);
}
sysseek $file, $at, 0;
syswrite $file, pack 'NNa16NN', 0x12345678, 13, 'somebody else', 0, 0;
END
made e.qcow2 cluster_size=4k
within 20 perl extension.pl e.qcow2
extensions() { head -c 4096 e.qcow2 | tail -c +105 | sha256sum; }
before=$(extensions)
serves 'an extension that nobody knows' e.qcow2
[[ $(extensions) == "$before" ]] || fail "the header's extensions were changed"
head -c 4096 e.qcow2 | grep -q 'somebody else' || fail "there was no unknown extension"

made b.qcow2
within 20 qemu-img bitmap --add b.qcow2 one
within 20 qemu-img bitmap --add -g 4096 b.qcow2 two
bitmaps() {
    qemu-img info -f qcow2 --output=json b.qcow2 |
        jq -c '[."format-specific".data.bitmaps[] | .flags | contains(["in-use"])]'
}
add b.qcow2 --read-only
del
[[ $(bitmaps) == '[false,false]' ]] || fail "a reader marked bitmaps: $(bitmaps)"
serves 'bitmaps' b.qcow2
[[ $(bitmaps) == '[true,true]' ]] || fail "bitmaps are not marked as in use: $(bitmaps)"
within 20 qemu-img bitmap --remove b.qcow2 one
clean b.qcow2

name='an image on a block device'
say "$name"
within 20 dd if=/dev/zero of=/dev/ram1 bs=1M count=16 status=none
create dev.qcow2 $size
within 20 dd if=dev.qcow2 of=/dev/ram1 bs=64k conv=notrunc status=none
add /dev/ram1
put "$dev" ,fsync
truncate -s 0 model.raw
truncate -s $size model.raw
put model.raw ''
same "$dev" model.raw
del
within 60 qemu-img convert -f qcow2 -O raw /dev/ram1 after.raw
same after.raw model.raw
clean /dev/ram1
say 'a block device beneath an image'
within 20 dd if=whole.raw of=/dev/ram1 bs=64k conv=notrunc,fsync status=none
create above.qcow2 $size backing_file=/dev/ram1,backing_fmt=raw
refused '--allow-backing /dev/ram1' -- ublk-qcow2 add -f above.qcow2
serves "a device beneath" above.qcow2 --allow-backing /dev/ram1
no_devices
