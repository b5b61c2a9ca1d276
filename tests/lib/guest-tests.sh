# shellcheck shell=bash
# What the scripts in tests/guest say about themselves, for tests/all and tests/vm/guest-runner.
# Each may have comment lines at its head, of which these are the defaults:
#
#   # kernels: old new     the kernels to run it on
#   # disk: no             yes: the scratch file system is on a disk with a volatile write cache
#   # cpus: 2
#   # memory: 8G
#   # timeout: 300         seconds
#
# A script runs as root in an empty folder of its own below $VM_SCRATCH, passes with status 0, is
# skipped with 77 (its last line says why) and fails with anything else, or if it leaves a device
# or a server behind, or if the kernel complains meanwhile.

# header SCRIPT KEY DEFAULT
header() {
    local value
    value=$(sed -n "/^#/!q; s/^# $2: *//p" "$1" | head -n 1)
    echo "${value:-$3}"
}

# What in a kernel's log is a failure.
# shellcheck disable=SC2034
kernel_complaints='WARNING:|BUG:|Oops|hung task|blocked for more than|general protection fault'
