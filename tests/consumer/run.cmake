# cmake -DKIND=static -DBUILD=<onepass build folder> -DSCRATCH=<folder to use> -P run.cmake
# cmake -DKIND=shared -DSOURCE=<onepass source folder> -DSCRATCH=<folder to use> -P run.cmake
# Installs that build, or a shared one made here, moves the installation, and builds and runs this folder's project
# against it.
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY OUTPUT_QUIET)
endfunction()

file(REMOVE_RECURSE ${SCRATCH}/first ${SCRATCH}/prefix ${SCRATCH}/build)
if(KIND STREQUAL shared)
  set(BUILD ${SCRATCH}/onepass)
  run(${CMAKE_COMMAND} -S ${SOURCE} -B ${BUILD} -G Ninja -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Release
      -DONEPASS_CPU_TIERS=native)
  run(${CMAKE_COMMAND} --build ${BUILD} --parallel 2)
endif()
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${SCRATCH}/first)
file(RENAME ${SCRATCH}/first ${SCRATCH}/prefix)  # the package may not remember where it was installed
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${SCRATCH}/build -G Ninja -DCMAKE_BUILD_TYPE=Release
    -DCMAKE_PREFIX_PATH=${SCRATCH}/prefix)
run(${CMAKE_COMMAND} --build ${SCRATCH}/build)
run(${CMAKE_CTEST_COMMAND} --test-dir ${SCRATCH}/build --output-on-failure)
