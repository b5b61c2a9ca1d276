//! The kernel's ublk interface as data: structures, commands, flags (`linux/ublk_cmd.h`).
//!
//! Layouts are fixed by the kernel; their sizes are asserted when this file is compiled. Every
//! structure is plain old data without padding, so turning one into bytes needs no `unsafe`.

use bytemuck::{Pod, Zeroable};

/// Sectors of the block layer, whatever the logical block size.
pub const SECTOR: u64 = 512;
/// The largest queue depth the driver knows; also the stride of the descriptor arrays.
pub const MAX_QUEUE_DEPTH: u16 = 4096;
/// What a fetch ends with when the device stops: do not fetch again.
pub const RES_ABORT: i32 = -libc::ENODEV;

/// Payload of a control command (in the 80 command bytes of a wide SQE).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct CtrlCmd {
    pub dev_id: u32,
    /// `u16::MAX` where the command is not about a queue.
    pub queue_id: u16,
    /// Length of the buffer at `addr`.
    pub len: u16,
    pub addr: u64,
    pub data: u64,
    pub dev_path_len: u16,
    pub pad: u16,
    pub reserved: u32,
}

/// What ADD_DEV negotiates and GET_DEV_INFO reports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct DevInfo {
    pub nr_hw_queues: u16,
    pub queue_depth: u16,
    pub state: u16,
    pub pad0: u16,
    pub max_io_buf_bytes: u32,
    pub dev_id: u32,
    pub ublksrv_pid: i32,
    pub pad1: u32,
    pub flags: u64,
    pub ublksrv_flags: u64,
    pub owner_uid: u32,
    pub owner_gid: u32,
    pub reserved: [u64; 2],
}

/// The parameters of every disk.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ParamBasic {
    pub attrs: u32,
    pub logical_bs_shift: u8,
    pub physical_bs_shift: u8,
    pub io_opt_shift: u8,
    pub io_min_shift: u8,
    pub max_sectors: u32,
    pub chunk_sectors: u32,
    pub dev_sectors: u64,
    pub virt_boundary_mask: u64,
}

/// The limits of DISCARD and WRITE ZEROES.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ParamDiscard {
    pub alignment: u32,
    pub granularity: u32,
    pub max_discard_sectors: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_segments: u16,
    pub reserved: u16,
}

/// Device numbers, filled in by the driver once the disk exists.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ParamDevt {
    pub char_major: u32,
    pub char_minor: u32,
    pub disk_major: u32,
    pub disk_minor: u32,
}

/// The beginning of the kernel's parameter block: it takes any length and ignores what is missing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct Params {
    pub len: u32,
    pub types: u32,
    pub basic: ParamBasic,
    pub discard: ParamDiscard,
    pub devt: ParamDevt,
    /// The zoned parameters, which are never set.
    pub zoned: [u32; 8],
    /// What the memory of requests has to be aligned to, less one, where their pages go down.
    pub dma_alignment: u32,
    pub reserved: u32,
    /// What follows is never set; the length of the whole is a multiple of 8.
    pub unused: u32,
}

pub const PARAM_BASIC: u32 = 1 << 0;
pub const PARAM_DISCARD: u32 = 1 << 1;
pub const PARAM_DMA_ALIGN: u32 = 1 << 4;

pub const ATTR_READ_ONLY: u32 = 1 << 0;
pub const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
pub const ATTR_FUA: u32 = 1 << 3;

/// Payload of FETCH and COMMIT (in the 16 command bytes of a normal SQE).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct IoCmd {
    pub queue: u16,
    pub tag: u16,
    pub result: i32,
    pub addr: u64,
}

/// Payload of the commands for many requests at a time (in the same 16 bytes).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct BatchCmd {
    pub queue: u16,
    pub flags: u16,
    /// How many elements lie at the address of the SQE, and bytes of each.
    pub elements: u16,
    pub element_bytes: u8,
    pub reserved: u8,
    pub unused: u64,
}

/// One request of a batch: its reply, and the buffer for the next request of its tag.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Element {
    pub tag: u16,
    /// The number under which the pages of the next request are to be registered.
    pub register: u16,
    pub result: i32,
}

/// In `flags`: behind each element, the address of a buffer.
pub const BATCH_HAS_ADDRESS: u16 = 1 << 1;

/// A request as the driver describes it in the mapped array, one per tag.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct IoDesc {
    pub op_flags: u32,
    pub nr_sectors: u32,
    pub start_sector: u64,
    pub addr: u64,
}

const _: () = {
    assert!(size_of::<CtrlCmd>() == 32);
    assert!(size_of::<DevInfo>() == 64);
    assert!(size_of::<ParamBasic>() == 32);
    assert!(size_of::<ParamDiscard>() == 20);
    assert!(size_of::<ParamDevt>() == 16);
    assert!(size_of::<Params>() == 120);
    assert!(size_of::<IoCmd>() == 16);
    assert!(size_of::<BatchCmd>() == 16);
    assert!(size_of::<Element>() == 8);
    assert!(size_of::<IoDesc>() == 24);
};

/// What a FETCH or COMMIT says of the buffer that the driver registers for the next request: its
/// number in the ring's table, in the place of an address (`struct ublk_auto_buf_reg`, no flags).
pub fn auto_register(index: u16) -> u64 {
    u64::from(index)
}

/// Where the payload of a request lies in the character device, for pread and pwrite.
pub fn payload_offset(queue: u16, tag: u16, at: u32) -> u64 {
    const BEGIN: u64 = 0x8000_0000;
    const TAG_SHIFT: u32 = 25;
    const QUEUE_SHIFT: u32 = TAG_SHIFT + 16;
    BEGIN + (u64::from(queue) << QUEUE_SHIFT | u64::from(tag) << TAG_SHIFT) + u64::from(at)
}

pub const OP_READ: u8 = 0;
pub const OP_WRITE: u8 = 1;
pub const OP_FLUSH: u8 = 2;
pub const OP_DISCARD: u8 = 3;
pub const OP_WRITE_ZEROES: u8 = 5;
/// In `op_flags`: reply only when the write would survive a power cut.
pub const IO_F_FUA: u32 = 1 << 13;
/// In `op_flags` of WRITE ZEROES: keep the space.
pub const IO_F_NOUNMAP: u32 = 1 << 15;

impl IoDesc {
    /// The operation: the low byte of `op_flags`.
    pub fn op(&self) -> u8 {
        // Masked, so the conversion cannot fail.
        u8::try_from(self.op_flags & 0xff).unwrap_or(u8::MAX)
    }
}

/// Bytes between the descriptor arrays of two queues: always as for the largest depth.
pub const DESC_STRIDE: u64 = {
    let bytes = MAX_QUEUE_DEPTH as u64 * size_of::<IoDesc>() as u64;
    bytes.next_multiple_of(4096)
};

/// `_IOC('u', number, size)`, as the driver wants its commands encoded since 6.4.
const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    assert!(size < 1 << 14, "the size field has 14 bits");
    #[expect(clippy::cast_possible_truncation, reason = "asserted in the line before")]
    let size = size as u32;
    direction << 30 | size << 16 | (b'u' as u32) << 8 | number
}
const READ: u32 = 2;
const READ_WRITE: u32 = 3;
const CTRL: usize = size_of::<CtrlCmd>();
const IO: usize = size_of::<IoCmd>();

/// A control command: its encoded number and its name for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    pub code: u32,
    pub name: &'static str,
}

const fn control(direction: u32, number: u32, name: &'static str) -> Command {
    Command { code: ioc(direction, number, CTRL), name }
}
pub const GET_QUEUE_AFFINITY: Command = control(READ, 0x01, "GET_QUEUE_AFFINITY");
pub const GET_DEV_INFO: Command = control(READ, 0x02, "GET_DEV_INFO");
pub const GET_DEV_INFO2: Command = control(READ, 0x12, "GET_DEV_INFO2");
pub const ADD_DEV: Command = control(READ_WRITE, 0x04, "ADD_DEV");
pub const DEL_DEV: Command = control(READ_WRITE, 0x05, "DEL_DEV");
pub const START_DEV: Command = control(READ_WRITE, 0x06, "START_DEV");
pub const STOP_DEV: Command = control(READ_WRITE, 0x07, "STOP_DEV");
pub const SET_PARAMS: Command = control(READ_WRITE, 0x08, "SET_PARAMS");
pub const GET_PARAMS: Command = control(READ, 0x09, "GET_PARAMS");
pub const START_USER_RECOVERY: Command = control(READ_WRITE, 0x10, "START_USER_RECOVERY");
pub const END_USER_RECOVERY: Command = control(READ_WRITE, 0x11, "END_USER_RECOVERY");
pub const GET_FEATURES: Command = control(READ, 0x13, "GET_FEATURES");
pub const DEL_DEV_ASYNC: Command = control(READ, 0x14, "DEL_DEV_ASYNC");
pub const UPDATE_SIZE: Command = control(READ_WRITE, 0x15, "UPDATE_SIZE");
pub const QUIESCE_DEV: Command = control(READ_WRITE, 0x16, "QUIESCE_DEV");
pub const TRY_STOP_DEV: Command = control(READ_WRITE, 0x17, "TRY_STOP_DEV");

pub const IO_FETCH: u32 = ioc(READ_WRITE, 0x20, IO);
pub const IO_COMMIT_AND_FETCH: u32 = ioc(READ_WRITE, 0x21, IO);
pub const IO_PREPARE_BATCH: u32 = ioc(READ_WRITE, 0x25, IO);
pub const IO_COMMIT_BATCH: u32 = ioc(READ_WRITE, 0x26, IO);
pub const IO_FETCH_BATCH: u32 = ioc(READ_WRITE, 0x27, IO);

pub const F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
pub const F_SUPPORT_ZERO_COPY: u64 = 1 << 0;
pub const F_USER_RECOVERY: u64 = 1 << 3;
pub const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
pub const F_UNPRIVILEGED_DEV: u64 = 1 << 5;
pub const F_USER_COPY: u64 = 1 << 7;
pub const F_USER_RECOVERY_FAIL_IO: u64 = 1 << 9;
pub const F_UPDATE_SIZE: u64 = 1 << 10;
pub const F_AUTO_BUF_REG: u64 = 1 << 11;
pub const F_QUIESCE: u64 = 1 << 12;
pub const F_BATCH_IO: u64 = 1 << 15;
pub const F_SAFE_STOP_DEV: u64 = 1 << 17;
pub const F_NO_AUTO_PART_SCAN: u64 = 1 << 18;

/// Those that this program makes use of, always or on demand.
pub const F_USED: u64 = F_SUPPORT_ZERO_COPY
    | F_USER_RECOVERY
    | F_USER_RECOVERY_REISSUE
    | F_UNPRIVILEGED_DEV
    | F_CMD_IOCTL_ENCODE
    | F_USER_COPY
    | F_USER_RECOVERY_FAIL_IO
    | F_UPDATE_SIZE
    | F_AUTO_BUF_REG
    | F_QUIESCE
    | F_BATCH_IO
    | F_SAFE_STOP_DEV
    | F_NO_AUTO_PART_SCAN;

/// Every flag known so far: bit, name, kernel that brought it.
pub const FEATURES: [(u32, &str, &str); 21] = [
    (0, "SUPPORT_ZERO_COPY", "6.15"),
    (1, "URING_CMD_COMP_IN_TASK", "6.0"),
    (2, "NEED_GET_DATA", "6.0"),
    (3, "USER_RECOVERY", "6.1"),
    (4, "USER_RECOVERY_REISSUE", "6.1"),
    (5, "UNPRIVILEGED_DEV", "6.3"),
    (6, "CMD_IOCTL_ENCODE", "6.4"),
    (7, "USER_COPY", "6.5"),
    (8, "ZONED", "6.6"),
    (9, "USER_RECOVERY_FAIL_IO", "6.13"),
    (10, "UPDATE_SIZE", "6.16"),
    (11, "AUTO_BUF_REG", "6.16"),
    (12, "QUIESCE", "6.16"),
    (13, "PER_IO_DAEMON", "6.16"),
    (14, "BUF_REG_OFF_DAEMON", "6.17"),
    (15, "BATCH_IO", "7.0"),
    (16, "INTEGRITY", "7.0"),
    (17, "SAFE_STOP_DEV", "7.0"),
    (18, "NO_AUTO_PART_SCAN", "7.0"),
    (19, "SHMEM_ZC", "7.1"),
    (20, "IO_DESC_SIZE", "7.3"),
];

pub const STATE_DEAD: u16 = 0;
pub const STATE_LIVE: u16 = 1;
/// Without a server: requests wait for one.
pub const STATE_QUIESCED: u16 = 2;
/// Without a server: requests fail until there is one.
pub const STATE_FAIL_IO: u16 = 3;

/// The name of a device state, as the `ublk` tool prints it.
pub fn state_name(state: u16) -> &'static str {
    match state {
        STATE_DEAD => "DEAD",
        STATE_LIVE => "LIVE",
        STATE_QUIESCED => "QUIESCED",
        STATE_FAIL_IO => "FAIL_IO",
        _ => "UNKNOWN",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_numbers_are_those_of_the_header() {
        assert_eq!(ADD_DEV.code, 0xc020_7504);
        assert_eq!(GET_FEATURES.code, 0x8020_7513);
        assert_eq!(IO_FETCH, 0xc010_7520);
        assert_eq!(IO_FETCH_BATCH, 0xc010_7527);
    }

    #[test]
    fn features_stand_at_their_bit() {
        for (index, (bit, _, _)) in FEATURES.iter().enumerate() {
            assert_eq!(index, *bit as usize);
        }
    }
}
