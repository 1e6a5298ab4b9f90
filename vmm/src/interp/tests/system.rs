//! Control registers, MSRs, tables, ports, privilege.

use super::super::flat::PortAccess;
use super::super::{Exception, Step};
use super::machine::*;
use crate::cpu::eflags::{AC, IF, IOPL};
use crate::cpu::{cr0, cr4, efer};

const GP: Exception = Exception::gp(0);

/// mov CRn, eax with EAX = `value`.
fn set_control(machine: &mut Machine, n: u8, value: u32) -> Step {
    machine.cpu.gpr[0] = value;
    machine.run(&[0x0f, 0x22, 0xc0 | n << 3])
}

#[test]
fn privileged_instructions_are_gp_for_users() {
    for bytes in [
        &[0xf4][..],                        // hlt
        &[0x0f, 0x20, 0xc0],                // mov eax, cr0
        &[0x0f, 0x22, 0xd8],                // mov cr3, eax
        &[0x0f, 0x06],                      // clts
        &[0x0f, 0x01, 0xf0],                // lmsw
        &[0x0f, 0x01, 0x15, 0, 0x60, 0, 0], // lgdt
        &[0x0f, 0x01, 0x1d, 0, 0x60, 0, 0], // lidt
        &[0x0f, 0x01, 0x3d, 0, 0x60, 0, 0], // invlpg
        &[0x0f, 0x08],                      // invd
        &[0x0f, 0x09],                      // wbinvd
        &[0x0f, 0x32],                      // rdmsr
        &[0x0f, 0x30],                      // wrmsr
        &[0x0f, 0x33],                      // rdpmc
        &[0xfa],                            // cli
        &[0xfb],                            // sti
        &[0xe4, 0x60],                      // in
        &[0xee],                            // out
        &[0x6c],                            // insb
    ] {
        assert_eq!(Machine::user().fault(bytes), GP, "{bytes:02x?}");
    }
}

#[test]
fn cr0_rejects_impossible_combinations_and_ignores_reserved_bits() {
    let mut machine = Machine::kernel();
    assert_eq!(set_control(&mut machine, 0, cr0::PG), Step::Exception(GP), "PG without PE");
    assert_eq!(set_control(&mut machine, 0, cr0::PE | cr0::NW), Step::Exception(GP), "NW without CD");
    assert_eq!(machine.bus.paging.0, 0);
    assert_eq!(set_control(&mut machine, 0, cr0::PE | 0x1fc0), Step::Done);
    assert_eq!(machine.cpu.cr0, cr0::PE | cr0::ET);
    assert_eq!(set_control(&mut machine, 0, cr0::PE | cr0::PG | cr0::WP), Step::Done);
    assert_eq!((machine.bus.paging.0, machine.cpu.paging()), (1, true));
    assert_eq!(set_control(&mut machine, 0, cr0::PE | cr0::PG | cr0::WP | cr0::TS), Step::Done);
    assert_eq!(machine.bus.paging.0, 1, "TS means nothing to paging");
}

#[test]
fn refused_paging_changes_nothing() {
    for (n, value) in [(0, cr0::PE | cr0::PG), (3, 0x1000), (4, cr4::PAE)] {
        let mut machine = Machine::kernel();
        machine.bus.refuse_paging = true;
        machine.cpu.gpr[0] = value;
        let before = machine.cpu.clone();
        assert_eq!(machine.run(&[0x0f, 0x22, 0xc0 | n << 3]), Step::Exception(GP), "CR{n}");
        assert_eq!(machine.cpu, before, "CR{n}");
    }
}

#[test]
fn cr4_takes_what_cpuid_offers() {
    let offered = cr4::TSD
        | cr4::DE
        | cr4::PSE
        | cr4::PAE
        | cr4::MCE
        | cr4::PGE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT
        | cr4::SMEP
        | cr4::SMAP
        | cr4::UMIP;
    for bit in 0..32 {
        let mut machine = Machine::kernel();
        let step = set_control(&mut machine, 4, 1 << bit);
        let legal = offered >> bit & 1 != 0;
        assert_eq!(step, if legal { Step::Done } else { Step::Exception(GP) }, "bit {bit}");
    }
}

#[test]
fn cr2_cr3_and_reads() {
    let mut machine = Machine::kernel();
    assert_eq!(set_control(&mut machine, 2, 0x1234), Step::Done);
    assert_eq!(set_control(&mut machine, 3, 0x5018), Step::Done);
    assert_eq!((machine.cpu.cr2, machine.cpu.cr3, machine.bus.paging.0), (0x1234, 0x5018, 1));
    machine.done(&[0x0f, 0x20, 0xd9]);
    assert_eq!(machine.cpu.gpr[1], 0x5018);
    assert_eq!(set_control(&mut machine, 1, 0), Step::Exception(Exception::UD));
    assert_eq!(set_control(&mut machine, 5, 0), Step::Exception(Exception::UD));
}

#[test]
fn machine_status_word() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[0] = 0xffff_000e;
    machine.done(&[0x0f, 0x01, 0xf0]);
    assert_eq!(machine.cpu.cr0, cr0::PE | cr0::ET | cr0::MP | cr0::EM | cr0::TS, "PE stays");
    machine.done(&[0x0f, 0x06]);
    machine.done(&[0x0f, 0x01, 0xe1]);
    assert_eq!(machine.cpu.gpr[1], cr0::PE | cr0::ET | cr0::MP | cr0::EM);
    machine.done(&[0x0f, 0x01, 0x25, 0, 0x60, 0, 0]);
    assert_eq!(machine.bus.dword(DATA), 0x17, "two bytes");
}

#[test]
fn table_registers_load_and_store() {
    let mut machine = Machine::kernel();
    machine.bus.place(DATA, &[0xff, 0x01, 0x78, 0x56, 0x34, 0x12]);
    machine.done(&[0x0f, 0x01, 0x15, 0, 0x60, 0, 0]);
    assert_eq!((machine.cpu.gdtr.base, machine.cpu.gdtr.limit), (0x1234_5678, 0x1ff));
    machine.done(&[0x66, 0x0f, 0x01, 0x1d, 0, 0x60, 0, 0]);
    assert_eq!(machine.cpu.idtr.base, 0x0034_5678, "24 bits with a 16-bit operand");
    machine.done(&[0x66, 0x0f, 0x01, 0x05, 0x10, 0x60, 0, 0]);
    assert_eq!(machine.bus.memory[0x6010..0x6016], [0xff, 0x01, 0x78, 0x56, 0x34, 0x12]);
    machine.cpu.seg[3].limit = 0x6004;
    assert_eq!(machine.fault(&[0x0f, 0x01, 0x15, 0, 0x60, 0, 0]), GP, "six bytes are needed");
}

#[test]
fn umip_hides_the_tables_from_users() {
    let stores = [
        &[0x0f, 0x01, 0x05, 0, 0x60, 0, 0][..],
        &[0x0f, 0x01, 0x0d, 0, 0x60, 0, 0],
        &[0x0f, 0x00, 0xc0],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x01, 0xe0],
    ];
    for bytes in stores {
        Machine::user().done(bytes);
        let mut machine = Machine::user();
        machine.cpu.cr4 |= cr4::UMIP;
        assert_eq!(machine.fault(bytes), GP, "{bytes:02x?}");
    }
}

#[test]
fn misaligned_base_of_sgdt_stores_no_limit_either() {
    let mut machine = Machine::user();
    machine.cpu.eflags |= AC;
    machine.cpu.cr0 |= cr0::AM;
    assert_eq!(machine.fault(&[0x0f, 0x01, 0x05, 0x00, 0x60, 0, 0]), Exception::AC);
    assert_eq!(machine.bus.dword(DATA), 0);
    machine.done(&[0x0f, 0x01, 0x05, 0x02, 0x60, 0, 0]);
}

#[test]
fn str_and_sldt_zero_extend_to_registers() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[0] = u32::MAX;
    machine.done(&[0x0f, 0x00, 0xc8]);
    assert_eq!(machine.cpu.gpr[0], u32::from(TASK));
    assert_eq!(Machine::real().fault(&[0x0f, 0x00, 0xc0]), Exception::UD);
}

/// RDMSR of `index`, or its fault.
fn read_msr(machine: &mut Machine, index: u32) -> Result<u64, Exception> {
    machine.cpu.gpr[1] = index;
    match machine.run(&[0x0f, 0x32]) {
        Step::Done => Ok(u64::from(machine.cpu.gpr[2]) << 32 | u64::from(machine.cpu.gpr[0])),
        Step::Exception(exception) => Err(exception),
        other => panic!("{other:?}"),
    }
}

fn write_msr(machine: &mut Machine, index: u32, value: u64) -> Step {
    machine.cpu.gpr[1] = index;
    (machine.cpu.gpr[0], machine.cpu.gpr[2]) = (value as u32, (value >> 32) as u32);
    machine.run(&[0x0f, 0x30])
}

#[test]
fn msrs_that_exist_and_those_that_do_not() {
    let mut machine = Machine::kernel();
    assert_eq!(read_msr(&mut machine, 0x1b), Ok(0xfee0_0900));
    assert_eq!(read_msr(&mut machine, 0xfe), Ok(0));
    assert_eq!(read_msr(&mut machine, 0x277), Ok(0x0007_0406_0007_0406));
    assert_eq!(read_msr(&mut machine, 0x174), Err(GP));
    assert_eq!(write_msr(&mut machine, 0xfe, 0), Step::Exception(GP), "read-only");
    assert_eq!(write_msr(&mut machine, 0x277, 2), Step::Exception(GP), "no memory type 2");
    assert_eq!(write_msr(&mut machine, 0x277, 0x0605_0401), Step::Done);
    assert_eq!(write_msr(&mut machine, 0x1b, 0xfee0_0d00), Step::Exception(GP), "no x2APIC");
}

#[test]
fn efer_takes_nxe_alone() {
    let mut machine = Machine::kernel();
    for bit in [efer::SCE, efer::LME, efer::LMA] {
        assert_eq!(write_msr(&mut machine, 0xc000_0080, bit), Step::Exception(GP));
    }
    assert_eq!(write_msr(&mut machine, 0xc000_0080, efer::NXE), Step::Done);
    assert_eq!((machine.cpu.msrs.efer, machine.bus.paging.0), (efer::NXE, 1));
}

#[test]
fn time_stamp_counter_can_be_set_and_hidden() {
    let mut machine = Machine::user();
    machine.done(&[0x0f, 0x31]);
    machine.cpu.cr4 |= cr4::TSD;
    assert_eq!(machine.fault(&[0x0f, 0x31]), GP);
    let mut machine = Machine::kernel();
    assert_eq!(write_msr(&mut machine, 0x10, 1 << 40), Step::Done);
    machine.done(&[0x0f, 0x31]);
    assert_eq!(machine.cpu.gpr[2], 1 << 8);
}

#[test]
fn cpuid_comes_from_the_bus() {
    let mut machine = Machine::user();
    (machine.cpu.gpr[0], machine.cpu.gpr[1]) = (7, 0);
    machine.done(&[0x0f, 0xa2]);
    assert_eq!((machine.cpu.gpr[2], machine.cpu.gpr[1]), (0, 4));
}

#[test]
fn sti_holds_interrupts_for_one_instruction() {
    let mut machine = Machine::kernel();
    machine.done(&[0xfb]);
    assert!(machine.cpu.interrupt_shadow && !machine.cpu.interruptible());
    machine.done(&[0x90]);
    assert!(machine.cpu.interruptible());
    machine.done(&[0xfb]);
    assert!(machine.cpu.interruptible(), "IF was set before");
    machine.done(&[0xfa]);
    assert!(!machine.cpu.interruptible());
}

#[test]
fn iopl_opens_the_interrupt_flag_and_the_ports() {
    let mut machine = Machine::user();
    machine.cpu.eflags |= IOPL;
    machine.done(&[0xfb]);
    assert_eq!(machine.cpu.eflags & IF, IF);
    machine.done(&[0xe6, 0x80]);
    assert_eq!(machine.bus.ports, [PortAccess::Out(0x80, 1, 0)]);
}

/// A user whose TSS has a map that opens port 0x3f8 alone.
fn with_io_map() -> Machine {
    let mut machine = Machine::user();
    machine.cpu.tr.limit = 0x67 + 0x2000;
    machine.bus.place(TSS + 0x66, &[0x68, 0]);
    machine.bus.place(TSS + 0x68, &[0xff; 0x100]);
    machine.bus.place(TSS + 0x68 + 0x3f8 / 8, &[0xfe]);
    machine.bus.port_value = 0x1234_5678;
    machine
}

#[test]
fn io_map_opens_single_ports() {
    let mut machine = with_io_map();
    machine.cpu.gpr[2] = 0x3f8;
    machine.done(&[0xec]);
    assert_eq!(machine.cpu.gpr[0], 0x78);
    assert_eq!(machine.fault(&[0x66, 0xed]), GP, "two ports, one of them closed");
    machine.cpu.gpr[2] = 0x3f9;
    assert_eq!(machine.fault(&[0xec]), GP);
    machine.cpu.gpr[2] = 0x3f8;
    machine.cpu.tr.limit = 0x68 + 0x3f8 / 8;
    assert_eq!(machine.fault(&[0xec]), GP, "the byte behind must be inside too");
    machine.cpu.tr.limit += 1;
    machine.done(&[0xec]);
    machine.cpu.tr.attributes = 0x83;
    assert_eq!(machine.fault(&[0xec]), GP, "a 16-bit TSS has no map");
}

#[test]
fn in_and_out_of_all_widths() {
    let mut machine = Machine::kernel();
    (machine.cpu.gpr[0], machine.cpu.gpr[2], machine.bus.port_value) = (u32::MAX, 0xffff_0cf8, 0x0102_0304);
    machine.done(&[0xe4, 0x60]);
    assert_eq!(machine.cpu.gpr[0], 0xffff_ff04);
    machine.done(&[0x66, 0xed]);
    assert_eq!(machine.cpu.gpr[0], 0xffff_0304);
    machine.done(&[0xed]);
    assert_eq!(machine.cpu.gpr[0], 0x0102_0304);
    machine.done(&[0xef]);
    assert_eq!(machine.bus.ports[3], PortAccess::Out(0xcf8, 4, 0x0102_0304));
    assert_eq!(machine.bus.ports[0], PortAccess::In(0x60, 1));
}

#[test]
fn invlpg_tells_the_bus_whatever_the_segment_says() {
    let mut machine = Machine::kernel();
    (machine.cpu.seg[3].limit, machine.cpu.seg[3].base) = (0, 0x10);
    machine.done(&[0x0f, 0x01, 0x3d, 0x00, 0x60, 0, 0]);
    assert_eq!(machine.bus.invalidated, [umbra_mmu::Gva(DATA + 0x10)]);
}

#[test]
fn alignment_flag_tells_the_bus_under_smap() {
    let mut machine = Machine::kernel();
    machine.done(&[0x0f, 0x01, 0xcb]);
    assert_eq!((machine.cpu.eflags & AC, machine.bus.paging.0), (AC, 0));
    machine.cpu.cr4 |= cr4::SMAP;
    machine.done(&[0x0f, 0x01, 0xca]);
    assert_eq!((machine.cpu.eflags & AC, machine.bus.paging.0), (0, 1));
    assert_eq!(Machine::user().fault(&[0x0f, 0x01, 0xcb]), Exception::UD);
}
