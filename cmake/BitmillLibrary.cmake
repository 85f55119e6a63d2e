# bitmill_library(FOLDER SOURCES a.cc b.cc LIBRARIES x y): one static library per folder of src/.
# LIBRARIES are PUBLIC, so that the link order repeats the include direction of the folders.
function(bitmill_library folder)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBRARIES" ${ARGN})
  string(REPLACE "/" "_" name ${folder})
  add_library(bitmill_${name} STATIC ${ARG_SOURCES})
  target_include_directories(bitmill_${name} PUBLIC ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(bitmill_${name} PUBLIC ${ARG_LIBRARIES})
endfunction()
