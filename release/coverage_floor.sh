#!/bin/sh
# coverage_floor.sh COVERAGE FLOOR PACKAGE...: each package's branch coverage in percent; fails where one is below the floor.
coverage=$1
floor=$2
shift 2
status=0
for package in "$@"; do
    share=$("$coverage" report --include="$package/*" --format=total)
    echo "$package: $share % (at least $floor)"
    [ "$share" -ge "$floor" ] || status=1
done
exit $status
