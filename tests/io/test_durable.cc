#include "io/durable.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>

#include "io/expect_error.h"
#include "io/safetensors.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"

namespace bitmill {
namespace {
namespace fs = std::filesystem;
using testing::expect_error;
using testing::read_bytes;
using testing::TemporaryDirectory;
using testing::write_bytes;

size_t files_in(const std::string& directory) {
  return static_cast<size_t>(
      std::distance(fs::directory_iterator(directory), fs::directory_iterator()));
}

TEST(Durable, NothingUnderTheNameBeforeCommit) {
  const TemporaryDirectory dir;
  DurableFile file(dir.file("a.bin"));
  file.write("12345", 5);
  EXPECT_FALSE(fs::exists(dir.file("a.bin")));
  EXPECT_EQ(files_in(dir.path()), 1u);  // the temporary one, in the same directory
  file.write("678", 3);
  file.commit();
  EXPECT_EQ(read_bytes(dir.file("a.bin")), "12345678");
  EXPECT_EQ(files_in(dir.path()), 1u);
}

TEST(Durable, WithoutCommitTheOldContentStays) {
  const TemporaryDirectory dir;
  write_bytes(dir.file("a.bin"), "old");
  { DurableFile(dir.file("a.bin")).write("new", 3); }
  EXPECT_EQ(read_bytes(dir.file("a.bin")), "old");
  EXPECT_EQ(files_in(dir.path()), 1u);
  write_file_durably(dir.file("a.bin"), "new");
  EXPECT_EQ(read_bytes(dir.file("a.bin")), "new");
}

TEST(Durable, LeftoverOfACrashedRunIsNoObstacle) {
  const TemporaryDirectory dir;
  write_bytes(dir.file("a.bin.tmp-" + std::to_string(getpid()) + "-0"), "leftover");
  write_file_durably(dir.file("a.bin"), "new");
  EXPECT_EQ(read_bytes(dir.file("a.bin")), "new");
}

TEST(Durable, FilesFollowTheUmask) {
  const TemporaryDirectory dir;
  const mode_t before = umask(027);
  write_file_durably(dir.file("a"), "x");
  umask(before);
  EXPECT_EQ(fs::status(dir.file("a")).permissions(), static_cast<fs::perms>(0640));
}

TEST(Durable, UnwritablePlaces) {
  const TemporaryDirectory dir;
  expect_error([&] { DurableFile(dir.file("no/such/a.bin")); }, ExitCode::kOutput,
               {"no/such/a.bin", "cannot create", "No such file or directory"});
  write_bytes(dir.file("plain"), "");
  expect_error([&] { write_file_durably(dir.file("plain/a.bin"), "x"); }, ExitCode::kOutput,
               {"plain/a.bin", "Not a directory"});
  expect_error([&] { probe_writable(dir.file("missing")); }, ExitCode::kOutput,
               {"missing", "not writable"});
  expect_error([&] { probe_writable("/proc"); }, ExitCode::kOutput, {"/proc", "not writable"});
  expect_error([&] { make_directories(dir.file("plain/sub")); }, ExitCode::kOutput, {"plain"});
}

TEST(Durable, RenameOntoADirectoryFailsAndCleansUp) {
  const TemporaryDirectory dir;
  fs::create_directory(dir.file("a"));
  expect_error([&] { write_file_durably(dir.file("a"), "x"); }, ExitCode::kOutput,
               {"/a: cannot rename"});
  EXPECT_EQ(files_in(dir.path()), 1u);
}

// Runs `body` in a child process and gives its exit status.
int run_in_child(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// 0: the call failed as it should, with kOutput, the path and errno's text.
int check_fails(const std::function<void()>& call, const std::string& path, const char* reason) {
  try {
    call();
  } catch (const Error& error) {
    const std::string text = error.what();
    if (error.code() != ExitCode::kOutput) return 2;
    if (text.find(path) == std::string::npos) return 3;
    return text.find(reason) == std::string::npos ? 4 : 0;
  }
  return 1;
}

TEST(Durable, ReadOnlyDirectory) {
  const TemporaryDirectory dir;
  chmod(dir.path().c_str(), 0555);
  EXPECT_EQ(run_in_child([&] {
              constexpr uid_t kNobody = 65534;  // root may write everywhere
              if (geteuid() == 0 && setuid(kNobody) != 0) return 9;
              const int probe =
                  check_fails([&] { probe_writable(dir.path()); }, dir.path(), "Permission denied");
              return probe != 0 ? probe
                                : check_fails([&] { write_file_durably(dir.file("a"), "x"); },
                                              dir.file("a"), "Permission denied");
            }),
            0);
  chmod(dir.path().c_str(), 0755);
  EXPECT_EQ(files_in(dir.path()), 0u);
}

TEST(Durable, ProbeLeavesNothing) {
  const TemporaryDirectory dir;
  probe_writable(dir.path());
  EXPECT_EQ(files_in(dir.path()), 0u);
}

TEST(Durable, CopyRenameDirectories) {
  const TemporaryDirectory dir;
  make_directories(dir.file("x/y/z/"));
  make_directories(dir.file("x/y/z"));
  EXPECT_TRUE(fs::is_directory(dir.file("x/y/z")));
  std::string bytes(3'000'001, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 7 + (i >> 8));
  write_bytes(dir.file("from"), bytes);
  copy_file_durably(dir.file("from"), dir.file("x/to"));
  EXPECT_EQ(read_bytes(dir.file("x/to")), bytes);
  rename_durably(dir.file("x/to"), dir.file("x/y/moved"));
  EXPECT_FALSE(fs::exists(dir.file("x/to")));
  EXPECT_EQ(read_bytes(dir.file("x/y/moved")), bytes);
  expect_error([&] { rename_durably(dir.file("nothing"), dir.file("b")); }, ExitCode::kOutput,
               {"nothing", "No such file"});
  expect_error([&] { copy_file_durably(dir.file("nothing"), dir.file("b")); }, ExitCode::kOutput,
               {"nothing", "No such file"});
  expect_error([&] { copy_file_durably(dir.file("x"), dir.file("b")); }, ExitCode::kOutput,
               {"not a regular file"});
}

// Runs `body` in a child whose files may not grow beyond `bytes`, with SIGXFSZ ignored as main
// does.
int run_with_file_limit(rlim_t bytes, const std::function<int()>& body) {
  return run_in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{bytes, bytes};
    setrlimit(RLIMIT_FSIZE, &limit);
    return body();
  });
}

int check_too_large(const std::function<void()>& call, const std::string& path) {
  return check_fails(call, path, "File too large");
}

TEST(Durable, FileSizeLimitIsAnOutputErrorAndTheTemporaryIsGone) {
  const TemporaryDirectory dir;
  const std::string path = dir.file("big.bin");
  EXPECT_EQ(run_with_file_limit(4096,
                                [&] {
                                  return check_too_large(
                                      [&] { write_file_durably(path, std::string(10'000, 'x')); },
                                      path);
                                }),
            0);
  EXPECT_EQ(files_in(dir.path()), 0u);

  const std::string shard = dir.file("model.safetensors");
  EXPECT_EQ(run_with_file_limit(
                4096,
                [&] {
                  Tensor tensor = Tensor::zeros(DType::kF32, {100, 100});
                  return check_too_large([&] { write_safetensors(shard, {{"w", tensor}}); }, shard);
                }),
            0);
  EXPECT_EQ(files_in(dir.path()), 0u);
}

// Locks belong to open files, so two of them meet in one process as two jobs would.
TEST(OutputLock, ASecondWriterIsRefusedUntilTheFirstIsGone) {
  const TemporaryDirectory dir;
  OutputLock second;
  {
    OutputLock first;
    first.take(dir.file("out"));
    expect_error([&] { second.take(dir.file("out")); }, ExitCode::kOutput,
                 {"out", "another bitmill process"});
  }
  OutputLock third;
  EXPECT_NO_THROW(third.take(dir.file("out")));
}

}  // namespace
}  // namespace bitmill
