#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 180
# memory: 8G
# An image of 1 TiB opens like one of 1 GiB: in time, and in memory beside caches and payload pool.
source "$(dirname "$0")/lib.sh"

ROUNDS=${ROUNDS:-3} LIMIT_KIB=8192

milliseconds() { echo $((${EPOCHREALTIME/./} / 1000)); }

# memory PID: resident KiB in all, and of that in mappings larger than 16 MiB, which is the payload
# pool (one buffer per tag) and nothing else.
memory() {
    awk '/^[0-9a-f]+-[0-9a-f]+ / { next }
        $1 == "Size:" { large = $2 > 16384 }
        $1 == "Rss:" { all += $2; if (large) pool += $2 }
        END { print all + 0, pool + 0 }' "/proc/$1/smaps"
}

measure() {
    local image=$1 what=$2 start times=() pid all pool caches tables
    for ((round = 0; round < ROUNDS; round++)); do
        start=$(milliseconds)
        add "$image"
        times+=($(($(milliseconds) - start)))
        if ((round == ROUNDS - 1)); then
            pid=$(daemon_of "$id")
            read -r all pool < <(memory "$pid")
            read -r caches tables < <(within 20 ublk-qcow2 list -n "$id" --json |
                jq -r '.[0].memory | "\(.caches) \(.tables)"')
            [[ $caches != null ]] || fail "list --json has no memory.caches"
            # Something far into it, so that a table is read.
            within 20 dd if="$dev" of=/dev/null bs=4k count=1 skip=200000 iflag=direct status=none
        fi
        del
    done
    median=$(printf '%s\n' "${times[@]}" | sort -n | sed -n "$((ROUNDS / 2 + 1))p")
    rest=$((all - pool))
    say "$what: add $median ms (${times[*]}); resident $all KiB, of that payload pool $pool KiB," \
        "the rest $rest KiB (limit $LIMIT_KIB); caches $caches bytes, tables $tables bytes"
    ((rest < LIMIT_KIB)) || fail "$what: $rest KiB of resident memory beside the payload pool"
}

create small.qcow2 1G
create large.qcow2 1T
measure small.qcow2 '1 GiB, empty'
small=$median
measure large.qcow2 '1 TiB, empty'
# The machine is slow and busy: this finds work in proportion to the size, not percents.
((median <= 4 * small + 1000)) || fail "1 TiB takes $median ms, 1 GiB $small ms"
rm small.qcow2 large.qcow2

# With all tables. With clusters of 64 KiB these are 128 MiB of L2 tables and 32 MiB of refcounts,
# which takes qemu-img minutes in an emulated machine: METADATA=cluster_size=64k does it.
options=preallocation=metadata,${METADATA:-cluster_size=2M}
start=$(milliseconds)
within 900 qemu-img create -q -f qcow2 -o "$options" full.qcow2 1T
say "qemu-img create with $options took $(($(milliseconds) - start)) ms"
measure full.qcow2 "1 TiB, $options"
((median <= 4 * small + 1000)) || fail "1 TiB with metadata takes $median ms, 1 GiB $small ms"
rm full.qcow2
no_devices
