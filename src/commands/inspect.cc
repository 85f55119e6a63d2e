#include "commands/command.h"
namespace bitmill { int run_inspect(const CommandLine&, Communicator&) { return 0; } }
