#!/bin/sh -e
# A base image laid out like the official python:X.Y-slim one (python under /usr/local), made without pulling anything:
# Debian's minimal system plus the CPython that runs this script. Needs root, mmdebstrap and podman.
# usage: make-python-base.sh WORKDIR IMAGE_NAME
work=$1; image=$2; mkdir -p "$work"; hook=$work/hook.sh; tarball=$work/base.tar
prefix=$(python3 -c 'import sys; print(sys.base_prefix)')
v=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
cat > "$hook" <<H
set -e
mkdir -p "\$1/usr/local"
tar -C $prefix --exclude=__pycache__ --exclude='lib/python$v/test' --exclude='lib/python$v/config-*' --exclude='lib/libpython*.a' --exclude='lib/python$v/site-packages/*' --exclude='lib/python$v/idlelib' --exclude='lib/python$v/tkinter' -cf - bin/python$v lib/libpython$v.so.1.0 lib/python$v include/python$v/pyconfig.h | tar -C "\$1/usr/local" -xf -
ln -s python$v "\$1/usr/local/bin/python3"; ln -s python$v "\$1/usr/local/bin/python"
chroot "\$1" ldconfig; chroot "\$1" /usr/local/bin/python3 -m ensurepip >/dev/null
ln -sf pip3 "\$1/usr/local/bin/pip"
H
# Written under another name first: a run that was interrupted leaves no half of it behind.
[ -s "$tarball" ] || { mmdebstrap --quiet --variant=minbase --include=ca-certificates,netbase,tzdata,libssl3,libsqlite3-0,libffi8,libbz2-1.0,liblzma5,libreadline8,libncursesw6,libuuid1,zlib1g \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook="sh $hook \"\$1\"" bookworm "$work/new.tar" && mv "$work/new.tar" "$tarball"; }
podman import -q --change 'CMD ["python3"]' --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' --change 'ENV LANG=C.UTF-8' "$tarball" "$image"
