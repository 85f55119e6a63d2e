# shellcheck shell=bash disable=SC2034
# Sourced by the scripts of this folder: goes to the root of the tree and sets what every Open MPI run here needs.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ "$(id -u)" = 0 ]; then  # root is normal in containers; mpirun wants to be told
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# Small machines have fewer cores than ranks: allow that, and let waiting ranks give their core away.
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
# Containers without ptrace rights cannot copy between processes; shared memory works everywhere.
export OMPI_MCA_btl_vader_single_copy_mechanism=none

jobs="${BITMILL_JOBS:-$(nproc)}"

# configure PRESET [OPTION...]: quiet when nothing changed, the full log when it fails.
configure() {
  local preset="$1" log
  shift
  mkdir -p "build/$preset"
  log="build/$preset/configure.log"
  if ! cmake --preset "$preset" "$@" >"$log" 2>&1; then
    cat "$log" >&2
    return 1
  fi
}
