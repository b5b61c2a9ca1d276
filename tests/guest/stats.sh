#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 180
# memory: 4G
# The figures of a device: known I/O is counted, in every format; who asks in vain is told why; and
# what a server in the background logs arrives.
source "$(dirname "$0")/lib.sh"

# figure FILTER: of the present figures.
figure() { within 20 ublk-qcow2 stats -n "$id" --json | jq "$1"; }
# counts KIND: requests and bytes so far.
counts() { figure ".requests.$1 | \"\(.requests) \(.bytes)\"" | tr -d '"'; }
# counted KIND REQUESTS BYTES: so many more since the last look, which is in before.
counted() {
    local now requests bytes
    now=$(counts "$1")
    requests=$((${now% *} - ${before% *})) bytes=$((${now#* } - ${before#* }))
    [[ "$requests $bytes" == "$2 $3" ]] ||
        fail "$1: $requests requests of $bytes bytes more, expected $2 of $3"
}
# What udev looks for has come to an end.
quiet() {
    local last='' now
    for _ in {1..50}; do
        now=$(counts read)
        [[ $now != "$last" ]] || return 0
        last=$now
        sleep 0.7
    done
    fail "somebody goes on reading"
}

missing_process() { [[ ! -e /proc/$1 ]]; }

busybox syslogd -n -O "$PWD/syslog" &
syslog=$!
trap 'status=$?; set +e; kill $syslog; (exit $status); on_exit' EXIT
until_true 10 test -S /dev/log

create 'a "b"\c.qcow2' 256M
add 'a "b"\c.qcow2' -q 2 --recovery queue --log info
quiet

say 'known I/O'
before=$(counts read)
within 30 dd if="$dev" of=/dev/null bs=4k count=100 iflag=direct status=none
counted read 100 409600
before=$(counts write)
clusters=$(figure .stats.allocated_data)
within 30 dd if=/dev/urandom of="$dev" bs=64k count=64 oflag=direct conv=notrunc status=none
counted write 64 $((64 << 16))
[[ $(($(figure .stats.allocated_data) - clusters)) == 64 ]] || fail "64 clusters were written"
before=$(counts flush)
syncs=$(figure .stats.syncs)
for _ in {1..5}; do
    within 30 dd if=/dev/urandom of="$dev" bs=4k count=1 oflag=direct conv=notrunc,fsync status=none
done
counted flush 5 0
[[ $(($(figure .stats.syncs) - syncs)) -ge 5 ]] || fail "a flush without fdatasync"
before=$(counts discard)
within 30 blkdiscard -o 0 -l 1M "$dev"
counted discard 1 $((1 << 20))
before=$(counts write_zeroes)
within 30 blkdiscard -z -o 1M -l 1M "$dev"
counted write_zeroes 1 $((1 << 20))

say 'what is told agrees with itself'
quiet
within 20 ublk-qcow2 stats -n "$id" --json >json
jq -e '
    . as $all
    | all(.requests[]; .requests == (.latency.buckets | add) and .errors == 0
        and (.latency.buckets | length) == ($all.latency_limits_us | length))
    and (.requests | keys) == ["discard", "flush", "read", "write", "write_zeroes"]
    and .requests.read.latency.sum_us > 0
    and (.queues | length) == 2 and all(.queues[]; .responds and .requests_under_way == 0)
    and ([.queues[].requests.read] | add) == .requests.read.requests
    and ([.queues[].bytes] | add) == ([.requests[].bytes] | add)
    and ([.queues[].refused] | add) == 0
    and .stats.l2_hits > 0 and .stats.flushes == .requests.flush.requests
    and .leak_bound > 0 and .health == "good" and .degraded == false and .stuck == []
    and .log_lines_dropped == 0' json >/dev/null || fail "stats --json: $(cat json)"

within 20 ublk-qcow2 stats -n "$id" --prometheus >metrics
# Each sample is of the metric announced last and has the labels; buckets rise up to the count.
awk -v labels="{device=\"$dev\",image=\"$PWD/a \\\\\"b\\\\\"\\\\\\\\c.qcow2\"" '
    /^# HELP / { help = $3; next }
    /^# TYPE / {
        if ($3 != help || $3 in seen || $4 !~ /^(counter|gauge|histogram)$/) exit bad = 1
        seen[name = $3] = 1
        next
    }
    {
        if (index($0, name) != 1 || !index($0, labels)) { print; exit bad = 1 }
        if ($NF !~ /^[0-9]+(\.[0-9]+)?$/) { print; exit bad = 1 }
        if (/_bucket/) {
            if (/le="0.000001"/) below = 0
            if ($NF < below) { print; exit bad = 1 }
            below = $NF
        }
        if (/_seconds_count/ && $NF != below) { print; exit bad = 1 }
        samples++
    }
    END { if (bad || samples < 170) { print samples " samples"; exit 1 } }' metrics >wrong ||
    fail "stats --prometheus: $(cat wrong metrics)"
reads=$(jq .requests.read.requests json)
grep -qE "^ublk_qcow2_requests_total\{.*,kind=\"read\"\} $reads\$" metrics ||
    fail "not $reads reads: $(grep requests_total metrics)"

within 20 ublk-qcow2 stats -n "$id" >text
cat text
grep -qE "^read +$reads " text || fail "stats has no line of $reads reads"
grep -q '^queue 1 ' text || fail "stats has no second queue"
within 20 ublk-qcow2 list -n "$id" >text
grep -qE 'data path [a-z-]+ delivery [a-z]+ queues 2 file I/O direct recovery queue health good' text ||
    fail "list: $(cat text)"
within 20 ublk-qcow2 list -n "$id" --json |
    jq -e '.[0] | .recovery == "queue" and .degraded == false and .stuck == []
        and .stats.flushes >= 5' >/dev/null || fail "list --json"

say 'a line a second'
timeout 8 dd if="$dev" of=/dev/null bs=64k iflag=direct status=none &
reader=$!
timeout 5 ublk-qcow2 stats -n "$id" --watch >watch || [[ $? == 124 ]] || fail "stats --watch"
kill $reader 2>/dev/null || true
wait $reader || true
cat watch
[[ $(awk '$1 ~ /^[0-9]+$/ && $1 > 0 && $2 > 0 && $3 > 0' watch | wc -l) -ge 2 ]] ||
    fail "stats --watch did not see what was read"
# Nobody reads any more: no error.
within 20 bash -c "set -o pipefail; ublk-qcow2 stats -n $id --watch | head -n 1 >/dev/null" ||
    fail "stats --watch without a reader ended with $?"

say 'asked in vain'
refused 'no ublk device 77' list -- ublk-qcow2 stats -n 77
mv "/run/ublk-qcow2/$id.json" kept
refused "device $id" 'not one of ublk-qcow2' -- ublk-qcow2 stats -n "$id"
mv kept "/run/ublk-qcow2/$id.json"
pid=$(daemon_of "$id")
kill -STOP "$pid"
refused "process $pid" 'does not answer' -- ublk-qcow2 stats -n "$id"
within 20 ublk-qcow2 stats -n "$id" --prometheus 2>err | grep -q '^ublk_qcow2_up{.*} 0$' ||
    fail "a server that does not answer is up: $(<err)"
within 20 ublk-qcow2 list -n "$id" | grep -q 'does not answer' || fail "list of a stopped server"
kill -CONT "$pid"
bound=$(figure .leak_bound) || fail "a server that goes on does not answer"
kill -KILL "$pid"
until_true 10 missing_process "$pid"
refused "process $pid" 'has died' "recover -n $id" -- ublk-qcow2 stats -n "$id"
within 60 ublk-qcow2 recover -n "$id" >/dev/null || fail "recover failed"
[[ $(figure .requests.write.requests) == 0 ]] || fail "the successor counts from elsewhere"
del
sound 'a "b"\c.qcow2'
((leaks <= bound)) || fail "$leaks clusters are leaked, and at most $bound were told"

say 'logs'
grep -q "ublk-qcow2\[$pid\]: starting the ublk device\|ublk-qcow2\[$pid\]: device $id: starting" \
    syslog || fail "the log has no line of the server's start: $(cat syslog)"
grep -qE "daemon\.info ublk-qcow2" syslog || fail "no priority in the log: $(cat syslog)"
[[ $(grep -c "device $id: " syslog) -ge 2 ]] || fail "no line names the device: $(cat syslog)"
no_devices
