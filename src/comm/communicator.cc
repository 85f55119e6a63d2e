#include "comm/communicator.h"

#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <thread>
#include <utility>

namespace bitmill {
namespace {

// MPI 3.1 counts are ints: long messages go in pieces.
constexpr int64_t kChunk = int64_t{1} << 30;
constexpr int kPostTag = 3;

std::string mpi_text(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  return {text, static_cast<size_t>(length)};
}

void check(int code, const char* call) {
  if (code != MPI_SUCCESS) fail(ExitCode::kPeerLost, "{} failed: {}", call, mpi_text(code));
}

// What launchers leave in the environment. Their word only decides whether MPI_Init is called; MPI is the truth after.
bool launched() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "PMI_RANK", "MPI_LOCALNRANKS"})
    if (std::getenv(name) != nullptr) return true;
  return false;
}

int launcher_tasks() {
  // SLURM_NTASKS alone also stands in plain batch shells; SLURM_PROCID is only there under srun.
  const char* tasks = std::getenv("SLURM_PROCID") ? std::getenv("SLURM_NTASKS") : nullptr;
  return tasks ? std::atoi(tasks) : 1;
}

// Waits without burning the core: ranks of a pipeline wait for hours while others compute on the same node. Short waits,
// those of a stage's ranks for each other, cost microseconds.
template <typename Done>
void wait_politely(Done&& done) {
  auto pause = std::chrono::microseconds(2);
  while (!done()) {
    std::this_thread::sleep_for(pause);
    pause = std::min(pause + pause / 2, std::chrono::microseconds(1000));
  }
}

void wait_politely(MPI_Request* request, const char* call) {
  wait_politely([&] {
    int done = 0;
    check(MPI_Test(request, &done, MPI_STATUS_IGNORE), call);
    return done != 0;
  });
}

}  // namespace

struct Message::Requests {
  std::vector<MPI_Request> pieces;
};

Message::Message() = default;
Message::Message(Message&&) noexcept = default;

Message& Message::operator=(Message&& other) noexcept {
  std::swap(requests_, other.requests_);
  return *this;
}

Message::~Message() {
  if (!requests_) return;
  for (MPI_Request& request : requests_->pieces) {
    if (request == MPI_REQUEST_NULL) continue;
    MPI_Cancel(&request);
    MPI_Request_free(&request);
  }
}

bool Message::done() {
  if (!requests_) return true;
  int all = 0;
  check(MPI_Testall(static_cast<int>(requests_->pieces.size()), requests_->pieces.data(), &all, MPI_STATUSES_IGNORE),
        "MPI_Testall");
  if (all) requests_.reset();
  return all != 0;
}

void Message::wait() {
  wait_politely([&] { return done(); });
}

struct Communicator::Handle {
  MPI_Comm comm = MPI_COMM_WORLD;
};

#ifdef NDEBUG
Communicator::Communicator() : handle_(std::make_unique<Handle>()), checks_calls_(false) {}
#else
Communicator::Communicator() : handle_(std::make_unique<Handle>()), checks_calls_(true) {}
#endif

Communicator Communicator::start(int* argc, char*** argv) {
  Communicator comm;
  if (!launched()) {
    if (launcher_tasks() > 1)
      fail(ExitCode::kInternal,
           "srun started {} tasks but no MPI launcher information is in the environment; try srun --mpi=pmix",
           launcher_tasks());
    return comm;
  }
  int provided = 0;
  check(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
  comm.uses_mpi_ = true;
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &comm.size_);
  MPI_Comm node;
  check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, comm.rank_, MPI_INFO_NULL, &node),
        "MPI_Comm_split_type");
  MPI_Comm_rank(node, &comm.local_rank_);
  MPI_Comm_size(node, &comm.local_size_);
  MPI_Comm_free(&node);
  if (comm.size_ == 1 && launcher_tasks() > 1)
    fail(ExitCode::kInternal,
         "srun started {} tasks but MPI sees one: this MPI was built without the launcher's PMI; try srun --mpi=pmix",
         launcher_tasks());
  return comm;
}

Communicator::Communicator(Communicator&& other) noexcept = default;

Communicator::~Communicator() {
  if (!handle_ || !uses_mpi_) return;
  if (handle_->comm == MPI_COMM_WORLD) MPI_Finalize();
  else MPI_Comm_free(&handle_->comm);
}

Communicator Communicator::split(int color) const {
  Communicator part;
  part.local_rank_ = local_rank_;
  part.local_size_ = local_size_;
  part.checks_calls_ = checks_calls_;
  if (!uses_mpi_) return part;
  part.uses_mpi_ = true;
  check(MPI_Comm_split(handle_->comm, color, rank_, &part.handle_->comm), "MPI_Comm_split");
  MPI_Comm_set_errhandler(part.handle_->comm, MPI_ERRORS_RETURN);
  MPI_Comm_rank(part.handle_->comm, &part.rank_);
  MPI_Comm_size(part.handle_->comm, &part.size_);
  return part;
}

// All ranks bring the number of their call; the largest number and the largest negative one differ when two calls do.
void Communicator::enter(const char* call) {
  if (!checks_calls_ || size_ == 1) return;
  double id = 0;
  for (const char* c = call; *c != 0; ++c) id = std::fmod(id * 131 + *c, 1e9);
  const double mine[] = {id, -id};
  double all[2] = {};
  MPI_Request request;
  check(MPI_Iallreduce(mine, all, 2, MPI_DOUBLE, MPI_MAX, handle_->comm, &request), "MPI_Iallreduce");
  wait_politely(&request, "MPI_Iallreduce");
  if (all[0] != -all[1])
    fail(ExitCode::kInternal, "rank {} is about to {}, another rank is not: they would wait for each other for ever", rank_,
         call);
}

void Communicator::barrier() {
  if (!uses_mpi_) return;
  enter("wait at a barrier");
  MPI_Request request;
  check(MPI_Ibarrier(handle_->comm, &request), "MPI_Ibarrier");
  wait_politely(&request, "MPI_Ibarrier");
}

std::string Communicator::broadcast(const std::string& text, int root) {
  if (size_ == 1) return text;
  enter("broadcast");
  int64_t bytes = static_cast<int64_t>(text.size());
  MPI_Request request;
  check(MPI_Ibcast(&bytes, 1, MPI_INT64_T, root, handle_->comm, &request), "MPI_Ibcast");
  wait_politely(&request, "MPI_Ibcast");
  std::string result = rank_ == root ? text : std::string(static_cast<size_t>(bytes), '\0');
  for (int64_t at = 0; at < bytes; at += kChunk) {
    const int count = static_cast<int>(std::min(kChunk, bytes - at));
    check(MPI_Ibcast(result.data() + at, count, MPI_BYTE, root, handle_->comm, &request), "MPI_Ibcast");
    wait_politely(&request, "MPI_Ibcast");
  }
  return result;
}

std::vector<std::string> Communicator::gather(const std::string& text) {
  constexpr int kTag = 1;
  enter("gather");
  if (rank_ != 0) {
    const int64_t bytes = static_cast<int64_t>(text.size());
    send(&bytes, sizeof bytes, 0, kTag);
    send(text.data(), bytes, 0, kTag);
    return {};
  }
  std::vector<std::string> all{text};
  for (int from = 1; from < size_; ++from) {
    int64_t bytes = 0;
    receive(&bytes, sizeof bytes, from, kTag);
    std::string part(static_cast<size_t>(bytes), '\0');
    receive(part.data(), bytes, from, kTag);
    all.push_back(std::move(part));
  }
  return all;
}

double Communicator::max(double value) {
  if (size_ == 1) return value;
  enter("find a maximum");
  double result = 0;
  MPI_Request request;
  check(MPI_Iallreduce(&value, &result, 1, MPI_DOUBLE, MPI_MAX, handle_->comm, &request), "MPI_Iallreduce");
  wait_politely(&request, "MPI_Iallreduce");
  return result;
}

Message Communicator::start_send(const void* data, int64_t bytes, int to, int tag) {
  Message message;
  message.requests_ = std::make_unique<Message::Requests>();
  for (int64_t at = 0; at < bytes; at += kChunk) {
    const int count = static_cast<int>(std::min(kChunk, bytes - at));
    check(MPI_Isend(static_cast<const char*>(data) + at, count, MPI_BYTE, to, tag, handle_->comm,
                    &message.requests_->pieces.emplace_back()),
          "MPI_Isend");
  }
  return message;
}

Message Communicator::start_receive(void* data, int64_t bytes, int from, int tag) {
  Message message;
  message.requests_ = std::make_unique<Message::Requests>();
  for (int64_t at = 0; at < bytes; at += kChunk) {
    const int count = static_cast<int>(std::min(kChunk, bytes - at));
    check(MPI_Irecv(static_cast<char*>(data) + at, count, MPI_BYTE, from, tag, handle_->comm,
                    &message.requests_->pieces.emplace_back()),
          "MPI_Irecv");
  }
  return message;
}

void Communicator::post(const std::string& text) {
  BITMILL_CHECK(rank_ != 0);
  send(text.data(), static_cast<int64_t>(text.size()), 0, kPostTag);
}

std::optional<std::string> Communicator::poll_post() {
  if (size_ == 1) return std::nullopt;
  int there = 0, count = 0;
  MPI_Status status;
  check(MPI_Iprobe(MPI_ANY_SOURCE, kPostTag, handle_->comm, &there, &status), "MPI_Iprobe");
  if (!there) return std::nullopt;
  MPI_Get_count(&status, MPI_BYTE, &count);
  std::string text(static_cast<size_t>(count), '\0');
  receive(text.data(), count, status.MPI_SOURCE, kPostTag);
  return text;
}

std::optional<Error> Communicator::agree(const std::optional<Error>& mine) {
  const int first = static_cast<int>(-max(mine ? -rank_ : -size_));  // lowest failing rank, size_ when none failed
  if (first == size_) return std::nullopt;
  const std::string text =
      broadcast(mine ? std::to_string(static_cast<int>(mine->code())) + " " + mine->what() : "", first);
  const size_t blank = text.find(' ');
  return Error(static_cast<ExitCode>(std::stoi(text.substr(0, blank))), text.substr(blank + 1));
}

void Communicator::abort(ExitCode code) {
  if (uses_mpi_ && size_ > 1) MPI_Abort(MPI_COMM_WORLD, static_cast<int>(code));
  std::_Exit(static_cast<int>(code));
}

}  // namespace bitmill
