// What every command that computes sets up first: threads, compute type, backend, transport, and one agreed configuration.
#pragma once

#include <memory>

#include "comm/transport.h"
#include "core/options.h"
#include "pipeline/loader.h"

namespace bitmill {

struct Session {
  ModelSource source;
  DType compute;
  int threads;  // of this rank
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Transport> transport;
};

// Collective. Opens model.path, resolves compute and threads, makes backend and transport. Throws AgreedError.
Session open_session(const RunOptions& options, Communicator& comm);

// threads=auto: the CPUs of this rank's affinity mask, shared among the ranks of this node that have the same mask.
int resolve_threads(const std::string& threads, Communicator& comm);

// Error(kUsage) naming `key` when a required text option is empty.
void require(const std::string& value, const std::string& key, const std::string& what);

// Is FILE of --json or --dump-logits writable? Found before any compute: Error(kOutput). Rank 0 probes. Collective.
void check_writable_target(const std::string& file, Communicator& comm);

// Rank 0 writes the machine-readable result of a command when --json was given.
void write_json_result(const RunOptions& options, Communicator& comm, const std::string& text);

}  // namespace bitmill
