//! What a kernel and a program say of themselves: machine, whether anything else is needed to run them.
//!
//! Specification: Linux, Documentation/arch/x86/boot.rst; ELF.

use object::elf::{EM_AARCH64, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};
use object::read::pe::{ImageNtHeaders, PeFile64};
use stiefel_shared::kernel::is_bzimage;

/// PE machine numbers.
const PE_AMD64: u16 = 0x8664;
const PE_ARM64: u16 = 0xaa64;

/// Why a kernel or a program cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProgramError {
    /// The file is no kernel that could be booted.
    #[error("it is neither a bzImage nor an EFI kernel: give the file that the bootloader loads")]
    NotAKernel,
    /// The file is no program.
    #[error("it is no ELF program")]
    NotAProgram,
    /// The program needs libraries, which the ramdisk does not have.
    #[error("it is not static (it needs {loader}): build it with crt-static")]
    Dynamic {
        /// The loader it asks for.
        loader: String,
    },
    /// The kernel could not run the program.
    #[error("it is for another machine than the kernel: build it for the kernel's architecture")]
    OtherMachine,
}

/// Processor architectures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Machine {
    X86_64,
    Aarch64,
}

/// Which machine a kernel is for.
pub(super) fn kernel_machine(kernel: &[u8]) -> Result<Machine, ProgramError> {
    if let Ok(pe) = PeFile64::parse(kernel) {
        return match pe.nt_headers().file_header().machine.get(object::LittleEndian).0 {
            PE_AMD64 => Ok(Machine::X86_64),
            PE_ARM64 => Ok(Machine::Aarch64),
            _ => Err(ProgramError::NotAKernel),
        };
    }
    if is_bzimage(kernel) {
        Ok(Machine::X86_64)
    } else {
        Err(ProgramError::NotAKernel)
    }
}

/// The loader that a program asks for, if it asks for one and is one.
#[must_use]
pub fn interpreter(program: &[u8]) -> Option<String> {
    let header = FileHeader64::<object::Endianness>::parse(program).ok()?;
    loader(header, program).ok()?
}

fn loader(header: &FileHeader64<object::Endianness>, program: &[u8]) -> Result<Option<String>, ProgramError> {
    let broken = |_| ProgramError::NotAProgram;
    let endian = header.endian().map_err(broken)?;
    let segments = header.program_headers(endian, program).map_err(broken)?;
    let asks = segments.iter().find(|segment| segment.p_type(endian) == PT_INTERP);
    Ok(asks.map(|segment| {
        let path = segment.data(endian, program).unwrap_or_default();
        String::from_utf8_lossy(path).trim_end_matches('\0').to_owned()
    }))
}

/// Checks that a program runs on `machine` without anything else.
pub(super) fn check_static(program: &[u8], machine: Machine) -> Result<(), ProgramError> {
    let broken = |_| ProgramError::NotAProgram;
    let header = FileHeader64::<object::Endianness>::parse(program).map_err(broken)?;
    let endian = header.endian().map_err(broken)?;
    if !matches!(header.e_type(endian), ET_EXEC | ET_DYN) {
        return Err(ProgramError::NotAProgram);
    }
    let wanted = match machine {
        Machine::X86_64 => EM_X86_64,
        Machine::Aarch64 => EM_AARCH64,
    };
    if header.e_machine(endian) != wanted {
        return Err(ProgramError::OtherMachine);
    }
    match loader(header, program)? {
        None => Ok(()),
        Some(loader) => Err(ProgramError::Dynamic { loader }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{EM_X86_64, cases, dynamic_program, kernel, static_program};
    use proptest::prelude::*;

    #[test]
    fn only_static_programs_for_the_machine_pass() {
        assert_eq!(check_static(&static_program(EM_X86_64), Machine::X86_64), Ok(()));
        assert_eq!(
            check_static(&static_program(EM_X86_64), Machine::Aarch64),
            Err(ProgramError::OtherMachine)
        );
        let loader = "/lib64/ld-linux-x86-64.so.2".to_owned();
        assert_eq!(
            check_static(&dynamic_program(), Machine::X86_64),
            Err(ProgramError::Dynamic { loader })
        );
        assert_eq!(
            check_static(b"#!/bin/sh\n", Machine::X86_64),
            Err(ProgramError::NotAProgram)
        );
    }

    #[test]
    fn this_very_test_is_a_static_program() {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let machine = if cfg!(target_arch = "x86_64") {
            Machine::X86_64
        } else {
            Machine::Aarch64
        };
        assert_eq!(check_static(&program, machine), Ok(()));
    }

    #[test]
    fn kernel_says_its_machine() {
        assert_eq!(kernel_machine(&kernel("6.1.0-13-amd64")), Ok(Machine::X86_64));
        assert_eq!(kernel_machine(b"\x7fELF"), Err(ProgramError::NotAKernel));
    }

    proptest! {
        #![proptest_config(cases(256))]
        #[test]
        fn damaged_files_never_panic(at in any::<prop::sample::Index>(), value: u8, len in any::<prop::sample::Index>()) {
            for mut bytes in [static_program(EM_X86_64), dynamic_program(), kernel("1.2.3")] {
                let at = at.index(bytes.len());
                bytes[at] = value;
                bytes.truncate(len.index(bytes.len() + 1));
                let _ = (kernel_machine(&bytes), check_static(&bytes, Machine::X86_64));
            }
        }
    }
}
