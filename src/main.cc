// bitmill: the program. Everything happens in src/commands.
#include <csignal>

#include "commands/command.h"

int main(int argc, char** argv) {
  std::signal(SIGXFSZ, SIG_IGN);  // a file size limit is a write error with a message, not a death
  return bitmill::run_command_line(argc, argv);
}
