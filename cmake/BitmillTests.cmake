# add_unit_test(NAME SOURCES a.cc LIBRARIES x [LABELS l] [TIMEOUT s]): one GoogleTest program, one ctest entry.
# add_mpi_test(NAME RANKS 1 2 3 SOURCES a.cc LIBRARIES x): the same program once per rank count, 60 s limit each:
# a hang is the usual failure of distributed code, so ctest owns the clock.
find_package(GTest REQUIRED)
find_package(Python3 COMPONENTS Interpreter)

# Ranks outnumber cores on small machines, so waiting ranks must yield; root is normal in containers.
set(BITMILL_MPI_ENV
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
  OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_hwloc_base_binding_policy=none)
set(BITMILL_TEST_ENV
  BITMILL_SOURCE_DIR=${PROJECT_SOURCE_DIR} BITMILL_BINARY_DIR=${PROJECT_BINARY_DIR}
  "ASAN_OPTIONS=detect_stack_use_after_return=1:check_initialization_order=1:allocator_may_return_null=1"
  UBSAN_OPTIONS=print_stacktrace=1
  LSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/sanitizers/leaks.supp:print_suppressions=0
  TSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/sanitizers/threads.supp:print_suppressions=0)

# Sanitizer builds are several times slower; their presets say how much more time every test gets.
set(BITMILL_TEST_TIME_FACTOR 1 CACHE STRING "Every test's time limit is multiplied by this")

# limit_test_time(SECONDS NAME...): after so many seconds ctest ends the test and counts it as failed.
function(limit_test_time seconds)
  math(EXPR seconds "${seconds} * ${BITMILL_TEST_TIME_FACTOR}")
  set_tests_properties(${ARGN} PROPERTIES TIMEOUT ${seconds})
endfunction()

function(_bitmill_test_program name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBRARIES;LABELS;RANKS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE bitmill_test_support ${ARG_LIBRARIES} GTest::gtest GTest::gmock)
  if(BITMILL_SANITIZE STREQUAL "address")
    # Undefined behaviour is looked for in the libraries: in the tests' plain loops the checks double both the time to
    # compile and the time to run.
    target_compile_options(${name} PRIVATE -fno-sanitize=undefined,float-cast-overflow)
  endif()
endfunction()

function(add_unit_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBRARIES;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 180)  # seconds; shared machines can be several times slower than usual
  endif()
  _bitmill_test_program(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
  limit_test_time(${ARG_TIMEOUT} ${name})
  set_tests_properties(${name} PROPERTIES LABELS "unit;${ARG_LABELS}"
    ENVIRONMENT "${BITMILL_TEST_ENV}" SKIP_REGULAR_EXPRESSION "listed below:\n(\\[  SKIPPED \\][^\n]*\n)+$")
endfunction()

function(add_mpi_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBRARIES;LABELS;RANKS" ${ARGN})
  _bitmill_test_program(${name} ${ARGN})
  bitmill_keep_libraries(${name})
  foreach(ranks ${ARG_RANKS})
    add_test(NAME ${name}_ranks_${ranks} COMMAND ${MPIEXEC_EXECUTABLE} -n ${ranks} $<TARGET_FILE:${name}>)
    limit_test_time(60 ${name}_ranks_${ranks})
    set_tests_properties(${name}_ranks_${ranks} PROPERTIES PROCESSORS ${ranks}
      LABELS "mpi;${ARG_LABELS}" ENVIRONMENT "${BITMILL_TEST_ENV};${BITMILL_MPI_ENV}")
  endforeach()
endfunction()

# mark_thread_tests(NAME...): unit tests whose work runs on several threads get the label threads; ThreadSanitizer runs
# them, and the target thread_tests builds them alone (launch/sanitize.sh).
add_custom_target(thread_tests)
function(mark_thread_tests)
  set_property(TEST ${ARGN} APPEND PROPERTY LABELS threads)
  add_dependencies(thread_tests ${ARGN})
endfunction()
