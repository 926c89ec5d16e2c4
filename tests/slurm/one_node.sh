#!/usr/bin/env bash
# A SLURM cluster of one node, this one, for the tests: real slurmctld and slurmd, everything that they write in one folder.
#
#   one_node.sh install         fetch Debian's packages slurm-wlm and munge, unless they are there
#   one_node.sh start FOLDER    start it; then `export SLURM_CONF=FOLDER/slurm.conf` and use sbatch, squeue, ...
#   one_node.sh stop FOLDER     end its jobs and its daemons
#
# Needs root. A SLURM that this machine may be part of is not touched: own configuration, own sockets, own ports, own key.
set -euo pipefail

install() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  # Neither package may start its service here.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  apt-get -qq install -y --no-install-recommends slurm-wlm munge >/dev/null
}

write_configuration() {
  local node
  node=$(hostname -s)
  cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmctldPort=36817
SlurmdPort=36818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
InactiveLimit=0
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=${CPUS:-$(nproc)} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  echo "CgroupAutomount=no" >"$folder/cgroup.conf"
}

start() {
  mkdir -p "$folder/state" "$folder/spool"
  write_configuration
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF"
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --format %t 2>/dev/null)" = idle ] && return
    sleep 0.2
  done
  echo "the node did not come up within 20 s:" >&2
  tail -n 20 "$folder"/*.log >&2
  exit 1
}

stop() {
  export SLURM_CONF="$folder/slurm.conf"
  scancel --me 2>/dev/null || true
  for daemon in slurmd slurmctld munged; do
    [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
  done
  for _ in $(seq 50); do
    [ -f "$folder/slurmctld.pid" ] || return 0
    sleep 0.2
  done
}

action=${1:?install, start or stop}
[ "$action" = install ] || folder=$(realpath -m "${2:?a folder}")
case $action in
  install | start | stop) "$action" ;;
  *) echo "$action is none of install, start and stop" >&2 && exit 2 ;;
esac
