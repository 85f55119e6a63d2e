// MPI control plane: rank, size, barrier, small host messages, agreement on errors. Wraps only the MPI calls used.
// Without a launcher's environment no MPI_Init is called: one process, rank 0 of 1.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/error.h"

namespace bitmill {

// An error that every rank throws at the same point, so that all can leave in order: rank 0 speaks, nobody is killed.
class AgreedError : public Error {
 public:
  explicit AgreedError(const Error& error) : Error(error) {}
};

// A message on its way. Its memory must stay until `wait` has returned or `done` has said true.
class Message {
 public:
  Message();  // nothing on its way: done
  ~Message();  // what is still on its way is cancelled
  Message(Message&&) noexcept;
  Message& operator=(Message&&) noexcept;
  bool done();  // also lets all messages of this process move on
  void wait();  // sleeps between polls, so that oversubscribed hosts stay usable

 private:
  friend class Communicator;
  struct Requests;
  std::unique_ptr<Requests> requests_;
};

class Communicator {
 public:
  // Initialises MPI when a launcher (mpirun, srun) started this process. Errors: kInternal when the launcher says N tasks
  // but MPI sees one (a mismatched PMI), with the hint that usually helps.
  static Communicator start(int* argc, char*** argv);
  Communicator(Communicator&&) noexcept;
  ~Communicator();  // MPI_Finalize when `start` initialised it
  // Collective. The ranks that give the same color, in the order of their ranks here. Local ranks are those of the whole.
  Communicator split(int color) const;

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool uses_mpi() const { return uses_mpi_; }
  // Ranks on this node, and this rank's number among them.
  int local_rank() const { return local_rank_; }
  int local_size() const { return local_size_; }

  void barrier();
  // `text` of rank `root` everywhere. Chunked below 2^30 bytes per message.
  std::string broadcast(const std::string& text, int root = 0);
  // On rank 0: one string per rank in rank order; elsewhere empty.
  std::vector<std::string> gather(const std::string& text);
  double max(double value);
  // Send and receive of any number of bytes, in pieces below 2^30. Messages of one pair and tag arrive in order.
  Message start_send(const void* data, int64_t bytes, int to, int tag);
  Message start_receive(void* data, int64_t bytes, int from, int tag);
  void send(const void* data, int64_t bytes, int to, int tag) { start_send(data, bytes, to, tag).wait(); }
  void receive(void* data, int64_t bytes, int from, int tag) { start_receive(data, bytes, from, tag).wait(); }

  // Short notes to rank 0 (progress, records), in order per sender: `post` on other ranks, `poll_post` on rank 0, which
  // returns at once, with a note if one has arrived.
  void post(const std::string& text);
  std::optional<std::string> poll_post();

  // Collective. Every rank brings its error, or none; all return the same: the error of the lowest failing rank. Use it
  // where all ranks reach the same point, so that everybody leaves with one exit code and one message.
  std::optional<Error> agree(const std::optional<Error>& mine);
  // Ends all ranks of the job with this code, now. The only call that kills peers.
  [[noreturn]] void abort(ExitCode code);

  // Before every collective call, do all ranks make the same one? Error(kInternal) naming two that differ, where a run would
  // hang. Costs a reduction per call: on in debug builds, off in others.
  void check_calls(bool on) { checks_calls_ = on; }

 private:
  struct Handle;  // of MPI
  Communicator();
  void enter(const char* call);

  std::unique_ptr<Handle> handle_;
  int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
  bool uses_mpi_ = false;
  bool checks_calls_;
};

// Runs `body` on every rank; if any throws Error, all throw the error of the lowest failing rank. Collective.
template <typename Body>
void together(Communicator& comm, Body&& body) {
  std::optional<Error> error;
  try {
    body();
  } catch (const Error& e) {
    error = e;
  }
  if (const auto agreed = comm.agree(error)) throw AgreedError(*agreed);
}

// Runs `body` on rank 0 and makes its error everybody's. Collective.
template <typename Body>
void on_rank_zero(Communicator& comm, Body&& body) {
  together(comm, [&] {
    if (comm.rank() == 0) body();
  });
}

}  // namespace bitmill
