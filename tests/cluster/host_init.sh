#!/usr/bin/env bash
# Process 1 of a virtual host, inside its own net, uts, ipc, mount and pid namespaces.
# Arguments: name of the host, folder of the cluster, folders below /tmp that all hosts share.
set -u
name=$1 cluster=$2
shift 2
here=$cluster/hosts/$name

hostname "$name"

# What is local to a node of a real cluster is local here: /tmp, /run, /dev/shm.
mkdir -p "$here/tmp"
mount -t tmpfs -o mode=1777 tmpfs "$here/tmp"
for shared in "$@"; do
  mkdir -p "$here/tmp/${shared#/tmp/}"
  mount --rbind "$shared" "$here/tmp/${shared#/tmp/}"
done
mount --bind "$cluster/etc/hosts" /etc/hosts
for folder in ssh slurm munge; do
  [[ -d /etc/$folder ]] && mount --bind "$cluster/etc/$folder" "/etc/$folder"
done
if [[ -d ~/.ssh ]]; then # the keys and hosts of whoever runs the tests are not ours
  mkdir -p "$here/dotssh"
  mount --bind "$here/dotssh" ~/.ssh
fi
mount --rbind "$here/tmp" /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
mkdir -p /run/sshd /run/lock

# The cable is plugged in from outside.
ip link set lo up
until ip -4 -o addr show eth0 2>/dev/null | grep -q inet; do sleep 0.02; done

/usr/sbin/sshd -D -E "$here/sshd.log" -f /etc/ssh/sshd_config &
echo $! >/run/sshd.pid
until grep -q 'Server listening' "$here/sshd.log" 2>/dev/null; do sleep 0.02; done
[[ -f $cluster/boot.sh ]] && bash "$cluster/boot.sh"
sleep infinity & # keeps the host up when sshd ends
touch "$here/ready"
wait # and reap what is adopted
