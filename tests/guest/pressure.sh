#!/usr/bin/env bash
# kernels: old new
# disk: no
# timeout: 600
# memory: 8G
# Memory runs short above devices. One has an ext4 under writeback and a swap file on that, another
# is swap as a whole; a load that needs more than it may have runs in a control group of 256 MiB,
# the servers outside it. It all goes on, nothing hangs, and memory and files are as they should be.
# By hand, longer than the limit, so without guest-runner:
#   tests/vm/run --timeout 1800 -- env SECONDS_OF_LOAD=600 bash -c \
#       'cd $VM_SCRATCH && exec "$0"' $PWD/tests/guest/pressure.sh
# pressure-small.sh is the same without a group, in a small machine.
source "$(dirname "$0")/lib.sh"

SECONDS_OF_LOAD=${SECONDS_OF_LOAD:-30}
# How much memory the load uses, in MiB, and the control group's limit, or nothing for no group.
HOG_MIB=${HOG_MIB:-384} GROUP_MIB=${GROUP_MIB-256}
# With nothing completed for so long, though something is under way, it hangs.
STALL=60
group=/sys/fs/cgroup/pressed
workers=()

# What a failure leaves would hold the devices for ever.
clean_up() {
    local status=$?
    kill "${workers[@]}" 2>/dev/null || true
    [[ -z $GROUP_MIB ]] || echo 1 2>/dev/null >"$group/cgroup.kill" || true
    # Not in a subshell of the test, and the reason is told already.
    ((status == 0)) || timeout -k 5 60 swapoff -a || true
    (exit "$status") || true
    return "$status"
}
trap 'clean_up; on_exit' EXIT

# A program that fills its memory with numbers, finds them again, and writes others, page by page,
# until its time is up, which begins when all is filled. It prints how many MiB it has gone through.
cat >hog.pl <<'END'
my ($mib, $seconds) = @ARGV;
my ($end, $pass) = (0, 0);
my @memory;
push @memory, "\0" x (1 << 20) for 1 .. $mib;
my $pieces = 0;
while (!$pass || time < $end) {
    for my $piece (0 .. $mib - 1) {
        last if $pass && time >= $end;
        $pieces++;
        for my $page (0 .. 255) {
            my $number = $piece * 256 + $page;
            my $have = unpack("Q", substr($memory[$piece], $page * 4096 + 1024, 8));
            my $want = $pass ? $pass * 1000003 + $number : 0;
            die "page $number has $have, not $want, in pass $pass\n" if $have != $want;
            substr($memory[$piece], $page * 4096 + 1024, 8) =
                pack("Q", ($pass + 1) * 1000003 + $number);
        }
    }
    $end = time + $seconds if !$pass++;
}
print "$pieces\n";
END

# Writes files, most without an fsync, and compares what it wrote a while ago.
write_files() {
    local count=0 at old
    # As long as the other load goes on.
    while [[ ! -s through ]]; do
        at=$((count % 12))
        dd if=pool of="above/file$at" bs=64k skip=$((count % 64)) count=96 status=none \
            ${sync[count % 4]:-} || return 1
        echo $((count % 64)) >"skip$at"
        count=$((count + 1))
        old=$((count % 12))
        [[ ! -e above/file$old ]] ||
            cmp -n $((96 << 16)) -i "$(($(<"skip$old") << 16)):0" pool "above/file$old" || return 1
    done
    echo "$count" >written
}
sync=([3]=conv=fsync)

# in_group COMMAND…
in_group() {
    [[ -z $GROUP_MIB ]] || echo "$BASHPID" >"$group/cgroup.procs"
    "$@"
}

# Ends with an error when a device has something under way, and makes no progress.
watch() {
    local number seen=() now under_way at=()
    while sleep 2; do
        for number in "$@"; do
            read -r under_way now < <(awk '{ print $9, $1 "," $5 "," $16 }' \
                "/sys/block/ublkb$number/stat")
            if [[ $now != "${seen[number]:-}" || $under_way == 0 ]]; then
                seen[number]=$now at[number]=$SECONDS
            elif ((SECONDS - at[number] > STALL)); then
                echo w >/proc/sysrq-trigger
                echo "device $number has completed nothing for $STALL s, and $under_way wait" >stall
                return 1
            fi
        done
    done
}

swapped_out() { sed -n 's/^pswpout //p' /proc/vmstat; }
oom_kills() { sed -n 's/^oom_kill //p' /proc/vmstat; }

# Where all hangs nobody can look any more: the stacks of tasks that hang go to the console.
dmesg -n 8

create a.qcow2 2G
create b.qcow2 1G
add a.qcow2
a=$id a_dev=$dev
add b.qcow2
b=$id b_dev=$dev
mkdir above
within 100 mkfs.ext4 -q "$a_dev"
within 30 mount "$a_dev" above
within 200 dd if=/dev/zero of=above/swap bs=1M count=512 oflag=direct status=none
chmod 600 above/swap
within 30 mkswap above/swap >mkswap.out
within 30 mkswap "$b_dev" >mkswap.out
# The same priority: both are used in turns.
within 30 swapon -p 5 above/swap
within 30 swapon -p 5 "$b_dev"
head -c 10M /dev/urandom >pool
if [[ -n $GROUP_MIB ]]; then
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
    echo +memory >/sys/fs/cgroup/cgroup.subtree_control
    mkdir -p "$group"
    echo $((GROUP_MIB << 20)) >"$group/memory.max"
fi
before=$(swapped_out) kills=$(oom_kills)

say "load for $SECONDS_OF_LOAD s: $HOG_MIB MiB${GROUP_MIB:+ in $GROUP_MIB}, and files"
in_group timeout -k 5 $((SECONDS_OF_LOAD + 300)) perl hog.pl "$HOG_MIB" "$SECONDS_OF_LOAD" \
    >through 2>hog.err &
hog=$!
in_group write_files 2>files.err &
files=$!
watch "$a" "$b" &
watch=$!
workers=("$hog" "$files" "$watch")
# Whoever is first; without the others' limits nothing here would end if it hung.
wait -n -p first "${workers[@]}" || status=$?
[[ ! -e stall ]] || fail "$(<stall)"
[[ -z ${status:-} ]] ||
    fail "$first of hog $hog, files $files ended with $status: $(cat hog.err files.err)"
for worker in "$hog" "$files"; do
    [[ $worker != "$first" ]] || continue
    until_true 200 eval "! kill -0 $worker 2>/dev/null || [[ -e stall ]]"
    [[ ! -e stall ]] || fail "$(<stall)"
    wait "$worker" ||
        fail "$worker of hog $hog, files $files ended with $?: $(cat hog.err files.err)"
done
kill "$watch"
workers=()
out=$((($(swapped_out) - before) / 256))
[[ -z $GROUP_MIB ]] || say "memory.events: $(tr '\n' ' ' <"$group/memory.events")"
((out > SECONDS_OF_LOAD / 4)) || fail "only $out MiB were swapped out: that is no pressure"
[[ $(oom_kills) == "$kills" ]] || fail "something was killed for want of memory"
for number in "$a" "$b"; do
    [[ $(health "$number") == good ]] || fail "device $number: health is '$(health "$number")'"
done
within 200 swapoff "$b_dev"
within 200 swapoff above/swap
within 60 sync -f above
echo 3 >/proc/sys/vm/drop_caches
for at in {0..11}; do
    [[ -e above/file$at ]] || continue
    cmp -n $((96 << 16)) -i "$(($(<"skip$at") << 16)):0" pool "above/file$at" ||
        fail "file $at is not what was written"
done
within 60 umount above
within 60 e2fsck -fn "$a_dev" >fsck 2>&1 || fail "e2fsck: $(<fsck)"
del_number "$a"
del_number "$b"
clean a.qcow2
clean b.qcow2
[[ -z $GROUP_MIB ]] || rmdir "$group"
say "$(<through) MiB gone through, $out MiB swapped out, $(<written) files of 6 MiB written"
no_devices
