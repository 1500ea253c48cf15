#!/bin/sh
# base.sh NAME: a local image NAME of Debian with Python 3.11, which takes the place of python:3.11-slim where no registry can be
# reached. It needs root, buildah and mmdebstrap; the packages come from the mirrors of this machine's apt.
set -eu
name=$1
tree=$(mktemp)
trap 'rm -f "$tree"' EXIT
mmdebstrap --quiet --format=tar --variant=minbase --include=python3,python3-venv,python-is-python3,ca-certificates \
    bookworm "$tree" ${DEBIAN_MIRROR:-http://deb.debian.org/debian}
container=$(buildah from scratch)
buildah add "$container" "$tree" / >/dev/null
rm -f "$tree"
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$container"
buildah commit --quiet --rm "$container" "$name"
