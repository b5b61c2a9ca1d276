#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 300
# memory: 8G
# kill -9 of the server at random moments under a writer that records outside the device what it has
# fsynced: leaks at most, and everything recorded is there. Every third image is an overlay, and the
# writer also discards and writes zeroes. By hand, longer than the limit, so without guest-runner:
#   tests/vm/run --timeout 4000 -- env KILLS=200 bash -c \
#       'cd $VM_SCRATCH && exec "$0"' $PWD/tests/guest/kill9.sh
source "$(dirname "$0")/lib.sh"

KILLS=${KILLS:-5} SEED=${SEED:-$((SRANDOM % 1000000))}
PER_IMAGE=${PER_IMAGE:-$((KILLS < 20 ? 2 : 7))}
SPAN=$((256 << 20))
RANDOM=$SEED
say "$KILLS kills, SEED=$SEED"

formats=(cluster_size=64k cluster_size=4k compat=v2 preallocation=metadata cluster_size=512
    cluster_size=2M lazy_refcounts=on)
# Above a base that ends within a cluster, in the middle of what is written.
overlays=(cluster_size=64k cluster_size=4k compat=v2 cluster_size=512 cluster_size=2M)
BASE=$(((SPAN * 3 / 4) + 1536))
image='' format='' total_leaks=0 durable=0 trimmed=0

# A new image of the next format; damage adds up over the kills that an image lives through.
new_image() {
    [[ -z $image ]] || rm "$image" log
    image=image$1.qcow2 write=() check=()
    if (($1 % 3 == 1)); then
        [[ -e base.raw ]] || {
            head -c $BASE /dev/urandom >base.raw
            base_sum=$(sum base.raw)
        }
        format=${overlays[$1 / 3 % ${#overlays[@]}]},backing_file=base.raw,backing_fmt=raw
        write=(--trim) check=(--base base.raw)
    else
        format=${formats[($1 - $1 / 3) % ${#formats[@]}]}
    fi
    create "$image" 1G "$format"
}

verify() {
    recorder verify --image-raw "$1" --log log "${check[@]}" --pin >verdict || {
        cp "$image" log "$VM_OUT/" || true
        fail "kill $kill, SEED=$SEED, $format: $(cat verdict) (image and log are in $VM_OUT)"
    }
}

for ((kill = 1; kill <= KILLS; kill++)); do
    (((kill - 1) % PER_IMAGE)) || new_image $(((kill - 1) / PER_IMAGE))
    add "$image"
    pid=$(daemon_of "$id")
    timeout -k 5 60 recorder write --device "$dev" --log log --seed "$RANDOM" --span $SPAN \
        "${write[@]}" >written 2>written.err &
    writer=$!
    # 0.3 to 3.3 s; the writer needs a moment to start.
    milliseconds=$((300 + RANDOM % 3000))
    sleep "$((milliseconds / 1000)).$(printf %03d $((milliseconds % 1000)))"
    kill -0 $writer 2>/dev/null || fail "the writer ended by itself: $(cat written written.err)"
    kill -KILL "$pid"
    wait $writer || fail "the writer failed: $(cat written written.err)"
    within 60 ublk-qcow2 del -n "$id" || fail "del of the dead device failed"
    gone "$id"

    # The dead server's last writes may still be under way, and hold its locks.
    until_true 20 unlocked "$image"
    sound "$image"
    total_leaks=$((total_leaks + leaks))
    within 100 qemu-img convert -f qcow2 -O raw "$image" raw
    verify raw
    rm raw
    say "kill $kill after $milliseconds ms, $format: $leaks leaks; $(<verdict)"
    if ((kill % PER_IMAGE == 0 || kill == KILLS)); then
        durable=$((durable + $(jq .durable_writes verdict)))
        trimmed=$((trimmed + $(grep -c -E '^[zt]' log || true)))
    fi
done
((durable > 0)) || fail "no write was ever recorded as durable"
((trimmed > 0)) || fail "nothing was discarded"
[[ $(sum base.raw) == "$base_sum" ]] || fail "the backing file was written to"
# As our own server finds it.
add "$image" --read-only
verify "$dev"
del
# A clean session after all of that leaves a sound image too.
add "$image"
recorder write --device "$dev" --log log --seed 1 --span $SPAN --writes 40 "${write[@]}" \
    >written
del
sound "$image"
within 100 qemu-img convert -f qcow2 -O raw "$image" raw
verify raw
say "$KILLS kills: $durable recorded writes, all there; $trimmed discards and zeroes; $total_leaks leaked clusters counted"
no_devices
