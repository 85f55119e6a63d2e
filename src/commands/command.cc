#include "commands/command.h"

#include <iostream>
#include <new>
#include <optional>

#include "core/log.h"

namespace bitmill {

const std::vector<Command>& commands() {
  static const std::vector<Command> kTable{
      {"plan", "what would run where: ranks, bytes, files, load rules; runs nothing", false, run_plan},
      {"quantize", "the main job; the same command again says \"nothing to do\"", false, run_quantize},
      {"eval", "perplexity of a float or quantized checkpoint", false, run_eval},
      {"inspect", "what a checkpoint holds: family, tensors, bits, sizes", true, run_inspect},
      {"verify", "every byte of an output: names, shapes, codes, config, load rules", true, run_verify},
      {"doctor", "build, MPI, processors, memory and output filesystem", false, run_doctor},
  };
  return kTable;
}

namespace {

void print_general_help() {
  std::cout << "bitmill " BITMILL_VERSION ": quantizes large language models as a pipeline of MPI ranks\n\n"
               "  bitmill COMMAND [CONFIG] [--section.key=value ...]\n"
               "  mpirun -n RANKS bitmill COMMAND ...        srun bitmill COMMAND ...\n\n";
  for (const Command& command : commands())
    std::cout << fmt::format("  {:<9} {:<8} {}\n", command.name, command.takes_directory ? "DIR" : "CONFIG", command.summary);
  std::cout << "\n  bitmill COMMAND --help lists every key with default and unit\n";
}

CommandLine parse(int argc, char** argv) {
  std::vector<std::string> names, with_directory;
  for (const Command& command : commands()) {
    names.push_back(command.name);
    if (command.takes_directory) with_directory.push_back(command.name);
  }
  return parse_command_line(argc, argv, names, with_directory);
}

int dispatch(const CommandLine& line, Communicator& comm) {
  if (line.version || line.command.empty() || line.help) {
    if (comm.rank() != 0) return 0;
    if (line.version) std::cout << "bitmill " BITMILL_VERSION "\n";
    else if (line.command.empty()) print_general_help();
    else print_option_help(std::cout, line.command);
    return 0;
  }
  for (const Command& command : commands())
    if (command.name == line.command) return command.run(line, comm);
  fail(ExitCode::kInternal, "command {} has no row in the table", line.command);
}

}  // namespace

int run_command_line(int argc, char** argv) {
  std::optional<Communicator> comm;
  try {
    comm.emplace(Communicator::start(&argc, &argv));
  } catch (const Error& error) {
    log_error(error.what(), false);
    return static_cast<int>(error.code());
  }
  set_log_rank(comm->rank(), comm->size());
  try {
    std::optional<CommandLine> line;
    together(*comm, [&] { line = parse(argc, argv); });
    return dispatch(*line, *comm);
  } catch (const AgreedError& error) {
    if (comm->rank() == 0) log_error(error.what(), false);
    return static_cast<int>(error.code());
  } catch (const Error& error) {
    log_error(error.what(), true);
    if (comm->size() > 1) comm->abort(error.code());
    return static_cast<int>(error.code());
  } catch (const std::bad_alloc&) {
    log_error("out of host memory", true);
    if (comm->size() > 1) comm->abort(ExitCode::kDoesNotFit);
    return static_cast<int>(ExitCode::kDoesNotFit);
  } catch (const std::exception& error) {
    log_error(fmt::format("internal error: {}", error.what()), true);
    if (comm->size() > 1) comm->abort(ExitCode::kInternal);
    return static_cast<int>(ExitCode::kInternal);
  }
}

}  // namespace bitmill
