#!/bin/sh
# Runs a compile command and fails also when ptxas reports that it gave up on what makes a Hopper kernel fast: setmaxnreg
# ignored (C7508), wgmma serialized (C7509 to C7512, C7515, C7518) or its operands not in flight (C7513, C7514). ptxas calls
# these information, so that no flag turns them into errors.
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$@" >"$log" 2>&1
status=$?
cat "$log" >&2
[ $status -eq 0 ] && grep -q 'C75\(0[89]\|1[0-9]\)' "$log" && status=1
exit $status
