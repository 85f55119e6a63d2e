// Linked into the programs of an AddressSanitizer build: plugins stay loaded. The leak check at exit names the library that
// allocated, and tests/sanitizers/leaks.supp goes by those names; Open MPI's plugins would be gone by then.
#include <dlfcn.h>

extern "C" int dlclose(void*) noexcept { return 0; }
