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
  ASAN_OPTIONS=detect_leaks=0)

function(_bitmill_test_program name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBRARIES;LABELS;RANKS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE bitmill_test_support ${ARG_LIBRARIES} GTest::gtest GTest::gmock)
endfunction()

function(add_unit_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBRARIES;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 180)  # seconds; shared machines can be several times slower than usual
  endif()
  _bitmill_test_program(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "unit;${ARG_LABELS}"
    ENVIRONMENT "${BITMILL_TEST_ENV}" SKIP_REGULAR_EXPRESSION "listed below:\n(\\[  SKIPPED \\][^\n]*\n)+$")
endfunction()

function(add_mpi_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBRARIES;LABELS;RANKS" ${ARGN})
  _bitmill_test_program(${name} ${ARGN})
  foreach(ranks ${ARG_RANKS})
    add_test(NAME ${name}_ranks_${ranks} COMMAND ${MPIEXEC_EXECUTABLE} -n ${ranks} $<TARGET_FILE:${name}>)
    set_tests_properties(${name}_ranks_${ranks} PROPERTIES TIMEOUT 60 PROCESSORS ${ranks}
      LABELS "mpi;${ARG_LABELS}" ENVIRONMENT "${BITMILL_TEST_ENV};${BITMILL_MPI_ENV}")
  endforeach()
endfunction()
