#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 420
# memory: 8G
# Many devices: one added and deleted again and again, and many at once. Nothing is left behind, and
# each takes little memory. By hand, longer than the limit, so without guest-runner:
#   tests/vm/run --timeout 3000 -- env ROUNDS=100 DEVICES=64 bash -c \
#       'cd $VM_SCRATCH && exec "$0"' $PWD/tests/guest/many.sh
source "$(dirname "$0")/lib.sh"

ROUNDS=${ROUNDS:-12} DEVICES=${DEVICES:-12}
# Of one idle device, in KiB, without what the options give to caches and payload.
LIMIT_KIB=8192

servers() {
    local path count=0
    for path in /proc/[0-9]*/comm; do
        [[ $(cat "$path" 2>/dev/null || true) != ublk-qcow2* ]] || count=$((count + 1))
    done
    echo "$count"
}
nothing_left() {
    no_devices
    # The process that sent a server's commands ends when it has seen that its server did.
    for _ in {1..20}; do
        [[ $(servers) != 0 ]] || break
        sleep 0.1
    done
    [[ $(servers) == 0 ]] || fail "$1: $(servers) servers are left"
    [[ -z $(ls /run/ublk-qcow2) ]] || fail "$1: left in /run/ublk-qcow2: $(ls /run/ublk-qcow2)"
    [[ -z $(within 20 ublk-qcow2 list) ]] || fail "$1: list shows $(within 20 ublk-qcow2 list)"
}
kernel_kib() {
    awk '$1 == "Slab:" || $1 == "KernelStack:" { sum += $2 } END { print sum }' /proc/meminfo
}

# --- again and again ---
create image.qcow2 64M
head -c 64K /dev/urandom >block
slowest=0
for ((round = 0; round < ROUNDS; round++)); do
    before=${EPOCHREALTIME/./}
    add image.qcow2
    ((id == 0)) || fail "round $round: the number 0 was not free, got $id"
    # Every time with something to close.
    within 20 dd if=block of="$dev" bs=64k seek=$((round % 1024)) oflag=direct status=none
    del
    took=$(((${EPOCHREALTIME/./} - before) / 1000))
    ((took <= slowest)) || slowest=$took
    # What is left of the first ones is what the kernel keeps for all.
    ((round != 2)) || early=$(kernel_kib)
done
nothing_left "$ROUNDS times"
late=$(kernel_kib)
clean image.qcow2
within 60 qemu-img convert -f qcow2 -O raw image.qcow2 raw
for ((round = 0; round < ROUNDS; round++)); do
    cmp -n 65536 -i "$((round * 65536)):0" raw block || fail "block $round is not there"
done
rm raw
say "$ROUNDS times add and del: nothing left, the slowest $slowest ms;" \
    "the kernel's memory grew by $((late - early)) KiB"

# --- many at once ---

# memory PID: resident KiB in all; of that in the large mappings, which are the payload's, one
# buffer per tag; and shared with every other server: the program itself.
memory() {
    awk '/^[0-9a-f]+-[0-9a-f]+ / { next }
        $1 == "Size:" { large = $2 > 16384 }
        $1 == "Rss:" { all += $2; if (large) pool += $2 }
        $1 == "Shared_Clean:" { shared += $2 }
        END { print all + 0, pool + 0, shared + 0 }' "/proc/$1/smaps"
}

for ((n = 0; n < DEVICES; n++)); do
    create "$n.qcow2" 1G
    add "$n.qcow2" -n "$n"
    [[ $dev == /dev/ublkb$n ]] || fail "add -n $n made $dev"
done
within 60 ublk-qcow2 list --json >json
jq -e "length == $DEVICES and all(.[]; .state == \"LIVE\" and .health == \"good\")" json \
    >/dev/null ||
    fail "list: $(jq -c '.[] | [.dev_id, .state, .health]' json)"
# All of them, at the same time.
for ((n = 0; n < DEVICES; n++)); do
    within 100 dd if=block of="/dev/ublkb$n" bs=64k seek="$n" oflag=direct conv=fsync status=none &
    writers[n]=$!
done
for ((n = 0; n < DEVICES; n++)); do
    wait "${writers[n]}" || fail "writing to device $n"
    within 20 dd if="/dev/ublkb$n" of=got bs=64k skip="$n" count=1 iflag=direct status=none
    cmp got block || fail "device $n has not what was written to it"
done
most=0
while read -r n pid caches tables; do
    read -r all pool shared < <(memory "$pid")
    # With the process that sends its commands.
    for child in $(cat "/proc/$pid/task/$pid/children"); do
        read -r more _ _ < <(memory "$child")
        all=$((all + more))
    done
    rest=$((all - pool - caches / 1024))
    ((n % 16)) || say "device $n: resident $all KiB; payload pool $pool," \
        "caches $((caches / 1024)), the rest $rest, of that the program's own pages $shared" \
        "and tables $((tables / 1024)) KiB"
    ((rest <= most)) || most=$rest
done < <(jq -r '.[] | "\(.dev_id) \(.daemon_pid) \(.memory.caches) \(.memory.tables)"' json)
say "$DEVICES devices: at most $most KiB each, without caches and payload (limit $LIMIT_KIB)"
((most < LIMIT_KIB)) || fail "$most KiB of resident memory for an idle device"

start=$SECONDS
# One after the other, so this has no limit of its own but the number of devices.
within $((30 + 5 * DEVICES)) ublk-qcow2 del -a || fail "del -a of $DEVICES devices"
say "del -a of $DEVICES devices: $((SECONDS - start)) s"
for ((n = 0; n < DEVICES; n++)); do
    gone "$n"
    clean "$n.qcow2"
done
nothing_left "$DEVICES devices"
