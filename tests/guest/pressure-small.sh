#!/usr/bin/env bash
# kernels: old new
# disk: yes
# timeout: 600
# memory: 1G
# Memory runs short above devices, in a machine that has little: see pressure.sh. By hand:
#   tests/vm/run --memory 1G --disk --timeout 1800 -- env SECONDS_OF_LOAD=600 bash -c \
#       'cd $VM_SCRATCH && exec "$0"' $PWD/tests/guest/pressure-small.sh
HOG_MIB=${HOG_MIB:-1100} GROUP_MIB=''
source "$(dirname "$0")/pressure.sh"
