// The commands: one file each, one row in the table of command.cc.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "core/options.h"

namespace bitmill {

// Runs a command on all ranks and returns the exit code. Throws AgreedError where all ranks fail alike, Error where one does.
using CommandFunction = int (*)(const CommandLine&, Communicator&);

struct Command {
  std::string name;
  std::string summary;  // one line for the general help
  bool takes_directory; // positional argument: a checkpoint directory instead of a config file
  CommandFunction run;
};

const std::vector<Command>& commands();

int run_plan(const CommandLine& line, Communicator& comm);
int run_quantize(const CommandLine& line, Communicator& comm);
int run_eval(const CommandLine& line, Communicator& comm);
int run_inspect(const CommandLine& line, Communicator& comm);
int run_verify(const CommandLine& line, Communicator& comm);
int run_doctor(const CommandLine& line, Communicator& comm);

// Parses argv, prints help or runs the command. The only place that turns an Error into an exit code; a lone rank's error
// ends the whole job.
int run_command_line(int argc, char** argv);

}  // namespace bitmill
